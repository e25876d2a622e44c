"""Model cards, the `README.md` of pipeline folders, and the way to the hub. A card that a person wrote or changed stays."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from unidiff.errors import first_line
from unidiff.schema import check_fields

CARD = "README.md"
_MARK = re.compile(rb"<!-- written by unidiff (\w{64}) -->\n?\Z")
_TASKS = {
    "text_to_image": 'pipe("a prompt").images[0]',
    "caption": 'pipe(image="picture.png").texts[0]',
    "answer": 'pipe(image="picture.png", question="what is it?").texts[0]',
    "inpaint": 'pipe(image="picture.png", mask_image="mask.png").images[0]',
    "generate": "pipe().images[0]",
}


@dataclass(frozen=True)
class ModelFacts:
    """What a model card says besides what the pipeline knows.

    Args:
        name: of the model, "owner/name" where it is on the hub.
        about: a sentence or two on what it draws.
        license: of the weights, as the hub spells it ("apache-2.0"); "" where nobody stated one.
        artwork: origin and licence of the pictures that it was trained on.
        training: settings by name. results: numbers by yardstick and metric, `{"EmojiEval": {"caption": 0.9}}`.
    """

    name: str = "a unidiff model"
    about: str = ""
    license: str = ""
    artwork: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "ModelFacts.")


class Origin(NamedTuple):
    """What the card of the model that a pipeline comes from says of licences; "" where it says nothing."""

    license: str = ""
    artwork: str = ""

    def completed(self, facts: ModelFacts | None = None) -> ModelFacts:
        """Facts with the licences of the origin, where they state none themselves."""
        facts = facts or ModelFacts()
        return replace(facts, license=facts.license or self.license, artwork=facts.artwork or self.artwork)

    def trained_on(self) -> Origin:
        """Of a model that was trained on, with pictures that nobody described."""
        known = not self.artwork or self.artwork.endswith(_LATER)
        return self if known else self._replace(artwork=self.artwork + _LATER)


_LATER = "; pictures of later training: not stated"


def read_origin(folder: Path) -> Origin:
    """From the metadata of a folder's card, whoever wrote it; a card that cannot be read says nothing."""
    try:
        data = ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # hub metadata by hand: any YAML
        return Origin()
    found = {name: data.get(name) for name in Origin._fields}
    return Origin(**{name: value for name, value in found.items() if isinstance(value, str)})


def card_of(pipe: Any, facts: ModelFacts | None = None) -> bytes:
    """The card of a pipeline of unidiff's own models, with metadata that the hub reads (UTF-8)."""
    facts, settings = facts or ModelFacts(), pipe.settings
    found = [
        EvalResult("any-to-any", _slug(yardstick), yardstick, _slug(metric), value, metric_name=metric)
        for yardstick, values in facts.results.items()
        for metric, value in values.items()
    ]
    data = ModelCardData(
        library_name="unidiff",
        license=facts.license or None,
        artwork=facts.artwork or None,
        pipeline_tag="any-to-any",
        tags=["unidiff", "diffusers", "masked-diffusion", "text-to-image", "image-to-text"],
        model_name=facts.name if found else None,
        eval_results=found or None,
    )
    (height, width), config = pipe.image_size, pipe.transformer.config
    millions = sum(p.numel() for p in pipe.transformer.parameters()) / 1e6
    parts = {
        "": f"# {facts.name}\n\n{facts.about}\n\nText and image tokens in one masked diffusion transformer: "
        f"{millions:.1f} M parameters, {config.num_layers} layers, width {config.hidden_size}; pictures of {width} x "
        f"{height} pixels in {settings.grid[0] * settings.grid[1]} codes, texts of at most {pipe.layout.most} tokens.",
        "Use": f'```python\nfrom unidiff import UniDiffPipeline\n\npipe = UniDiffPipeline.from_pretrained("{facts.name}")\n'
        f"{_TASKS[settings.trained[0]] if settings.trained else 'pipe()'}\n```\n\n"
        "Or `diffusers.DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`, with unidiff installed.",
        "Tasks": _listed({f"`{task}`": f"`{_TASKS[task]}`" for task in settings.trained}),
        "Training": _listed({f"`{name}`": f"{value}" for name, value in facts.training.items()}),
        "Results": _listed(
            {f"{y}, {m}": f"{value:.4g}" for y, values in facts.results.items() for m, value in values.items()}
        ),
        "Licence": f"Weights: {facts.license or 'not stated'}. Pictures it was trained on: {facts.artwork or 'not stated'}.",
    }
    body = "\n\n".join(f"## {title}\n\n{text}" if title else text for title, text in parts.items() if text)
    text = f"{ModelCard(f'---{chr(10)}{data.to_yaml()}{chr(10)}---{chr(10)}{chr(10)}{body}')}\n\n".encode()
    return text + f"<!-- written by unidiff {hashlib.sha256(text).hexdigest()} -->\n".encode()


def written_by_a_person(path: Path) -> bytes | None:
    """A card that is not as `card_of` wrote it; None for one that is, and where there is none."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    mark = _MARK.search(content)
    ours = mark is not None and hashlib.sha256(content[: mark.start()]).hexdigest() == mark[1].decode()
    return None if ours else content


def send_folder(
    folder: Path, repo_id: str, endpoint: str | None, token: str | None, private: bool | None, **options: Any
) -> str:
    """Put a folder into a repository of the hub, made where it does not exist; returns the commit's address.

    A model card there that a person wrote stays.

    Args:
        options: of `huggingface_hub.HfApi.upload_folder`.

    Raises:
        ValueError: a name that is none, a missing right, or a hub that cannot be reached.
    """
    hub = HfApi(endpoint=endpoint, token=token)
    try:
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        kept = []
        if hub.file_exists(repo_id, CARD, revision=options.get("revision")):
            with tempfile.TemporaryDirectory() as place:
                held = hub.hf_hub_download(repo_id, CARD, revision=options.get("revision"), local_dir=place)
                kept = [CARD] if written_by_a_person(Path(held)) is not None else []
        return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=kept, **options))
    except Exception as error:  # its clients changed their errors more than once
        raise ValueError(f"{repo_id!r} cannot be written on the hub: {first_line(error)}") from error


def _listed(rows: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in rows.items())


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")
