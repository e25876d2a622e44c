"""For `diffusers.DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`, with unidiff installed."""

from unidiff.pipeline import UniDiffPipeline as UniDiffPipeline
