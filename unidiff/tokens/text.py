"""`TextTokenizer`: strings to text ids and back, over any Hugging Face tokenizer; trains a byte-level BPE of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unidiff.errors import DamagedFile, read_json, reading, reason_of
from unidiff.files import filling_folder, path_of, resolve_link
from unidiff.hub import download
from unidiff.schema import check_value
from unidiff.tokens.text_folder import check_tokenizer_folder

DEFAULT_SPECIALS = ("eos", "caption", "question", "answer")
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


class TextTokenizer:
    """A thin wrapper round a Hugging Face tokenizer with the three promises unidiff needs.

    1. `decode(encode(s)) == s` for every Unicode string, when the tokenizer came from `train`: byte-level, no
       normaliser, no prefix space, no clean-up. A tokenizer from the hub keeps its own rules.
    2. Text never becomes a control token: `<|eos|>` typed by a person is encoded as the characters it is made of.
    3. Special tokens have short names: `special("caption")` is the id of `<|caption|>`.

    Args:
        tokenizer: a loaded Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if isinstance(tokenizer, type) or not hasattr(tokenizer, "get_vocab"):
            raise ValueError(f"the text tokenizer is {tokenizer!r:.80}; expected a Hugging Face tokenizer")
        self.tokenizer = tokenizer
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, specials: Sequence[str] = DEFAULT_SPECIALS) -> TextTokenizer:
        """Train a byte-level BPE.

        Args:
            texts: the corpus, one string per document; read once.
            vocab_size: the largest size, specials and the 256 bytes included. A small corpus gives fewer ids.
            specials: short names without `<|` and `|>`; they get the ids 0, 1, ... in this order. `eos` is required.

        Raises:
            ValueError: `vocab_size` cannot hold bytes and specials, a bad list of specials, or a corpus without text.
        """
        check_value(vocab_size, int, "vocab_size")
        check_value(specials, Sequence[str], "specials")
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise ValueError(f"texts are {texts!r:.80}; expected a list of strings, one for each document")
        specials = list(specials)
        if "eos" not in specials or len(set(specials)) != len(specials) or not all(specials):
            raise ValueError(f"specials {specials} must be distinct names that include 'eos'")
        smallest = 256 + len(specials)
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size {vocab_size} is too small: 256 bytes and {len(specials)} specials need at least {smallest}"
            )
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        names = [special_token(name) for name in specials]
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=names,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        characters = 0

        def checked() -> Iterator[str]:
            nonlocal characters
            for text in texts:
                _check_unicode(text)
                characters += len(text)
                yield text

        backend.train_from_iterator(checked(), trainer)
        if not characters:
            raise ValueError("the corpus holds no text; give at least one non-empty document")
        eos = special_token("eos")
        fast = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            eos_token=eos,
            extra_special_tokens=[name for name in names if name != eos],
            clean_up_tokenization_spaces=False,
            split_special_tokens=True,
        )
        return cls(fast)

    @classmethod
    def from_pretrained(cls, name: str | Path, **hub_options: Any) -> TextTokenizer:
        """Load a folder, or what lies on the hub under a name. A folder is never looked up on the network.

        Code that lies in a folder or on the hub (`auto_map`) is never run, nor is anybody asked about it.

        Args:
            hub_options: revision, cache_dir, token, local_files_only, force_download, subfolder.

        Raises:
            FileNotFoundError: the folder holds no tokenizer that can be read, or `name` is neither a folder nor a
                reachable hub name.
            ValueError: another option.
        """
        if unknown := sorted(set(hub_options) - set(_HUB_OPTIONS)):
            raise ValueError(f"from_pretrained got unknown arguments {unknown}; expected some of {list(_HUB_OPTIONS)}")
        folder = path_of(name)
        if not folder.is_dir() and (folder.is_absolute() or str(name).startswith(".") or len(folder.parts) > 2):
            raise FileNotFoundError(f"text tokenizer folder {str(name)!r} does not exist")
        inside = str(hub_options.pop("subfolder", None) or "")
        if not folder.is_dir():
            folder = download(str(name), _PATTERNS, "tokenizer", **hub_options)
        folder = folder / inside
        if not any((folder / file).is_file() for file in _FILES):
            raise FileNotFoundError(
                f"{str(folder)!r} holds no text tokenizer (no tokenizer.json); "
                "train one with tokenizers/train_text_tokenizer.py"
            )
        options = {"trust_remote_code": False, "local_files_only": True}
        return cls.read(folder, lambda: AutoTokenizer.from_pretrained(str(folder), **options))

    @classmethod
    def read(cls, name: str | Path, load: Callable[[], PreTrainedTokenizerBase]) -> TextTokenizer:
        """What `load` reads from `name`, or one sentence about it; errors as of `from_pretrained`."""
        if Path(name).is_dir():
            check_tokenizer_folder(name)
        try:
            with reading(name, "a text tokenizer"):
                tokenizer = cls(load())
                if not tokenizer._vocabulary:
                    raise DamagedFile("it has no words")
                tokenizer.specials()  # and the text of one: what is wrong shows here, not in the middle of the work
                tokenizer.encode("a")
                return tokenizer
        except (DamagedFile, OSError) as error:
            reason = reason_of(error.__cause__) if error.__cause__ else str(error)
            if "trust_remote_code" in str(error.__cause__):
                reason = "it needs code of its own (auto_map), which is never run here; save it as tokenizer.json"
            raise FileNotFoundError(f"{str(name)!r} cannot be read as a tokenizer: {reason}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; each file appears complete or not at all.

        Raises:
            ValueError: `folder` is a file, or holds a tokenizer of another kind. OSError: a full or read-only disk; the
                message names the folder.
        """
        folder = resolve_link(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is a file; name a folder to save the tokenizer in")
        with filling_folder(folder) as temporary:
            self.tokenizer.save_pretrained(temporary)
            _check_same_kind(folder, temporary)

    def encode(self, text: str) -> list[int]:
        """Text ids of a string, without any special token.

        Raises:
            ValueError: not a string, or lone surrogates, which no UTF-8 text can hold.
        """
        _check_unicode(text)
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Iterable[int], keep_specials: bool = False) -> str:
        """The string behind text ids. Special tokens are dropped unless `keep_specials`.

        Bytes that are no valid UTF-8, which only a sampled sequence can hold, become U+FFFD.

        Raises:
            ValueError: something else than whole numbers, or an id outside [0, size).
        """
        try:
            ids = [index(i) for i in ids]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"text ids are {ids!r:.80}; expected whole numbers") from error
        if bad := [i for i in ids if not 0 <= i < self.size]:
            raise ValueError(f"text id {bad[0]} is outside [0, {self.size}); was an image code or [MASK] passed?")
        text = self.tokenizer.decode(ids, skip_special_tokens=not keep_specials, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list only for a batch of sequences
        return text

    @property
    def size(self) -> int:
        """One more than the largest id: the width of the text range in a `Vocabulary`."""
        return max(self._vocabulary.values()) + 1

    @property
    def eos_id(self) -> int:
        """The end-of-text id, which also fills a text span."""
        return self.special("eos")

    @property
    def known_words(self) -> frozenset[str] | None:
        """All words of the texts that a model with this tokenizer was trained on; None where it reads free text.

        Kept in `tokenizer_config.json`, so it travels with the folder. Set it after training a tokenizer of a small language.
        """
        words = self.tokenizer.init_kwargs.get("known_words")
        return frozenset(map(str, words)) if isinstance(words, list | tuple) and words else None

    @known_words.setter
    def known_words(self, words: Iterable[str]) -> None:
        self.tokenizer.init_kwargs["known_words"] = sorted(set(words))

    def special(self, name: str) -> int:
        """The id of a special token by its short name (`eos`, `caption`, ...) or its full text.

        Raises:
            ValueError: this tokenizer has no such token.
        """
        check_value(name, str, "the name of a special token")
        for candidate in (special_token(name), name):
            if candidate in self._vocabulary and self._vocabulary[candidate] in self.tokenizer.all_special_ids:
                return self._vocabulary[candidate]
        named = getattr(self.tokenizer, f"{name}_token_id", None) if name in ("eos", "bos", "pad", "unk") else None
        if named is None:
            raise ValueError(f"the tokenizer has no special token {name!r}; it has {sorted(self.specials())}")
        return int(named)

    def specials(self) -> dict[str, int]:
        """Short names and ids of all special tokens; the names `Vocabulary.unified` takes."""
        tokens = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        named = {token.removeprefix("<|").removesuffix("|>"): int(i) for token, i in tokens}
        if self.tokenizer.eos_token_id is not None:
            named.setdefault("eos", int(self.tokenizer.eos_token_id))
        return named


def special_token(name: str) -> str:
    """The text form of a special token: `caption` becomes `<|caption|>`."""
    return f"<|{name}|>"


def _check_same_kind(folder: Path, written: Path) -> None:
    """Raise `ValueError` where files of another tokenizer would be overwritten."""
    there = [file.name for file in written.iterdir() if (folder / file.name).exists()]
    if there and _kind(folder) != _kind(written):
        raise ValueError(
            f"{str(folder)!r} holds another tokenizer ({there[0]}), which would be lost; name another folder"
        )


def _kind(folder: Path) -> tuple[Any, Any] | None:
    """Class and end-of-text of a saved tokenizer, None where nothing says them."""
    try:
        values = read_json(folder / "tokenizer_config.json", "tokenizer settings")
    except (ValueError, OSError):
        return None
    return values.get("tokenizer_class"), values.get("eos_token")


def _check_unicode(text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"expected a string to tokenize, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds the lone surrogate {text[error.start]!r} at character {error.start}; it is not Unicode text"
        ) from error
