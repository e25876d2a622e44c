"""The tasks of `UniDiffPipeline`, by what they give."""
