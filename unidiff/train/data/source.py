"""Where training tokens come from: `TokenSource`, and `TokenTable`, which holds every example as small integers in memory.

File format of a token table (safetensors):

    codes         int16/int32 [N, h, w]     image codes, 0 .. codebook_size - 1
    captions      int16/int32 [N, K, T]     K paraphrases (or [N, T]): task token, words, then EOS up to T
    questions     int16/int32 [N, Q, T]     optional (or [N, T]): question task token ... answer token, answer, EOS fill
    answer_start  int16/...   [N, Q]        with `questions` (or [N]): first answer position; everything before is given
    levels        int8/...    [N]           optional: difficulty for a curriculum, for instance the number of objects

    metadata["vocabulary"]: JSON of `Vocabulary.to_dict()`; metadata["text_prefix"]: leading caption positions that are
    always given (1 for a task token; default 1).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from unidiff.diffusion.noise import keyed_bits
from unidiff.errors import reading
from unidiff.files import replacing
from unidiff.tokens import Vocabulary

_PICK_STREAM = 0x5EED_0001
_DIMENSIONS = {"codes": 3, "captions": 3, "questions": 3, "answer_start": 2, "levels": 1}
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class TokenRows:
    """Tokens of B samples, int64, each modality counted from 0."""

    codes: Tensor  # [B, h, w]
    captions: Tensor  # [B, T]
    questions: Tensor | None = None  # [B, T]
    answer_start: Tensor | None = None  # [B]


class TokenSource(Protocol):
    """A deterministic map from a global sample index to tokens; the same for every batch size, rank and worker."""

    vocabulary: Vocabulary
    text_prefix: int

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def text_length(self) -> int: ...

    @property
    def rows(self) -> int | None:
        """Distinct samples, None for a stream without an end."""

    @property
    def has_questions(self) -> bool: ...

    def fetch(self, index: Tensor) -> TokenRows:
        """Tokens of the samples `index` (int64 `[B]`, global, unbounded)."""


class TokenTable:
    """All examples in memory. Sample i is row `permutation_e[i mod N]` of epoch e = i // N; its paraphrase and question
    are picked by a hash of (seed, i).

    Args:
        tensors: as in the file format above. vocabulary: the table's ids are offsets into its `text` and `image`.
        phases: `((first global index, highest level), ...)`, ascending from 0; None uses every row throughout.

    Raises:
        ValueError: shapes that disagree, ids outside the vocabulary, or a phase without rows.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        vocabulary: Vocabulary,
        text_prefix: int = 1,
        seed: int = 0,
        phases: tuple[tuple[int, int], ...] | None = None,
    ) -> None:
        self.tensors = _check_tensors(tensors, vocabulary)
        codes = self.tensors["codes"]
        self.rows, self.grid = len(codes), (codes.shape[1], codes.shape[2])
        self.text_length, self.has_questions = self.tensors["captions"].shape[-1], "questions" in self.tensors
        if not 0 <= text_prefix <= self.text_length:
            raise ValueError(f"text_prefix = {text_prefix} must lie within the {self.text_length} tokens of a caption")
        if phases and phases[0][0] != 0:
            raise ValueError(f"the first curriculum phase starts at sample {phases[0][0]}; it must start at 0")
        self.vocabulary, self.text_prefix, self.seed = vocabulary, text_prefix, seed
        self._phases: list[tuple[int, Tensor | None]]
        self._phases = [(start, self._rows_up_to(level)) for start, level in phases] if phases else [(0, None)]
        self._orders: dict[tuple[int, int], Tensor] = {}

    def digest(self) -> str:
        """SHA-256 of all numbers, whatever type the file keeps them in."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            for part in tensor.split(2**16):
                digest.update(part.long().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def contents(self) -> set[str]:
        """What copies of the table share; as `ShardTokens.contents`."""
        return {self.digest()}

    @classmethod
    def load(cls, path: str | Path) -> TokenTable:
        """Read a `.safetensors` table.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a safetensors file, or without the needed tensors and metadata.
        """
        name = f"token table {str(path)!r}"
        if not Path(path).is_file():
            raise FileNotFoundError(f"{name} does not exist; write it with `unidiff encode`")
        with reading(path, "a token table", "it is not a readable safetensors file"), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        if "vocabulary" not in metadata:
            raise ValueError(f"{name} has no `vocabulary` in its metadata; write it with TokenTable.save")
        with reading(path, "a token table", "write it with TokenTable.save"):
            vocabulary = Vocabulary.from_dict(json.loads(metadata["vocabulary"]))
            return cls(tensors, vocabulary, int(metadata.get("text_prefix", "1")))

    def seeded(self, seed: int, phases: tuple[tuple[int, int], ...] | None = None) -> TokenTable:
        """The same rows in another order; see the arguments of the class."""
        return TokenTable(self.tensors, self.vocabulary, self.text_prefix, seed, phases)

    def split(self, count: int) -> tuple[TokenTable, TokenTable]:
        """All but the last `count` rows, and those."""
        parts = [{k: v[rows] for k, v in self.tensors.items()} for rows in (slice(-count), slice(-count, None))]
        first, second = (TokenTable(part, self.vocabulary, self.text_prefix, self.seed) for part in parts)
        return first, second

    def save(self, path: str | Path) -> None:
        """Write the table atomically; int16 where the values fit."""
        tensors = {}
        for name, value in self.tensors.items():
            small = value.numel() == 0 or int(value.max()) < 2**15
            tensors[name] = value.to(torch.int16 if small else torch.int32).contiguous()
        metadata = {"vocabulary": json.dumps(self.vocabulary.to_dict()), "text_prefix": str(self.text_prefix)}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)

    def fetch(self, index: Tensor) -> TokenRows:
        """See `TokenSource.fetch`."""
        row = torch.tensor([self._row_of(int(i)) for i in index])
        picks = keyed_bits(self.seed, index, _PICK_STREAM, 2) & 0x7FFFFFFF  # [B, 2]
        captions, questions = self.tensors["captions"], self.tensors.get("questions")
        found = self.tensors["codes"][row].long(), captions[row, picks[:, 0] % captions.shape[1]].long()
        if questions is None:
            return TokenRows(*found)
        which = picks[:, 1] % questions.shape[1]
        return TokenRows(*found, questions[row, which].long(), self.tensors["answer_start"][row, which].long())

    def _row_of(self, index: int) -> int:
        phase = max(p for p, (start, _) in enumerate(self._phases) if start <= index)
        start, eligible = self._phases[phase]
        count = self.rows if eligible is None else len(eligible)
        epoch, place = divmod(index - start, count)
        if (phase, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key >= (phase, epoch - 1)}
            seed = int(keyed_bits(self.seed, torch.tensor(epoch), phase, 1)[0])
            self._orders[phase, epoch] = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        row = int(self._orders[phase, epoch][place])
        return row if eligible is None else int(eligible[row])

    def _rows_up_to(self, level: int) -> Tensor:
        if "levels" not in self.tensors:
            raise ValueError("data.curriculum is set but the token table has no `levels`; remove it or add them")
        rows = torch.nonzero(self.tensors["levels"] <= level)[:, 0]
        if len(rows) == 0:
            raise ValueError(f"no row has a level up to {level}; raise it in data.curriculum")
        return rows


def _check_tensors(tensors: dict[str, Tensor], vocabulary: Vocabulary) -> dict[str, Tensor]:
    if unknown := set(tensors) - set(_DIMENSIONS):
        raise ValueError(f"token table holds unknown tensors {sorted(unknown)}; expected some of {sorted(_DIMENSIONS)}")
    if missing := {"codes", "captions"} - set(tensors):
        raise ValueError(f"token table lacks {sorted(missing)}")
    if ("questions" in tensors) != ("answer_start" in tensors):
        raise ValueError("token table must hold `questions` and `answer_start` together")
    tensors = dict(tensors)
    for name, tensor in tensors.items():
        ndim = _DIMENSIONS[name]
        if name not in ("codes", "levels") and tensor.ndim == ndim - 1:
            tensor = tensors[name] = tensor[:, None]
        found = f"token table has {name} {tuple(tensor.shape)}"
        if tensor.ndim != ndim or tensor.dtype not in _WHOLE:
            raise ValueError(f"{found} of {tensor.dtype}; expected whole numbers in {ndim} dimensions")
        if not tensor.numel():
            raise ValueError(f"{found}; expected at least one number")
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        raise ValueError(f"token table rows disagree: { {k: tuple(v.shape) for k, v in tensors.items()} }")
    length, questions = tensors["captions"].shape[-1], tensors.get("questions")
    if questions is not None and questions.shape[:2] != tensors["answer_start"].shape:
        raise ValueError("token table must hold one `answer_start` for every question")
    if questions is not None and questions.shape[-1] != length:
        raise ValueError("captions and questions must have the same length T")
    sizes = {"codes": vocabulary.image_size, "captions": vocabulary.text_size, "questions": vocabulary.text_size}
    for name, size in {**sizes, "answer_start": length}.items():
        low, high = (int(end) for end in tensors[name].aminmax()) if name in tensors else (0, 0)
        if not 0 <= low <= high < size:
            raise ValueError(f"{name} has ids {low}..{high}, outside the vocabulary's 0..{size - 1}")
    return tensors
