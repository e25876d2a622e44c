"""Text: `<mask>` and `<mask:3>` for hidden tokens, words that a model was never taught, and `TextTokenizer`, to ids and back.

A model whose tokenizer carries a list of known words (`TextTokenizer.known_words`) was trained on these and no others; models
of free text have no list, and only words that their tokenizer has no ids for are reported.

Hugging Face's libraries are imported where they are used, so that the command line can look at its texts at once.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unidiff.errors import DamagedFile, few, reading, reason_of, warn
from unidiff.files import filling_folder, path_of, resolve_link
from unidiff.schema import check_value
from unidiff.tokens.text_folder import check_same_kind, check_tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HOLE_MARK = "\uf8ff"  # a private character that stands for a hole while a text is normalised
LONGEST_TYPED = 1000  # characters that are normalised: the time grows with the square
_PRIVATE = re.compile("[\ue000-\uf8ff]")  # a normaliser has signs of its own among them
MOST_TOKENS = 4096  # of a hole where the model sets no limit of its own
DEFAULT_SPECIALS = ("eos", "caption", "question", "answer")
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")
_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")
_HOLE = re.compile(r" ?<mask(?::([^<>]*))?>")
_MEANT = re.compile(r"<\s*/?\s*mask|\[MASK\]", re.IGNORECASE)  # what a person who writes a hole may have typed
# words, and signs that do more than part them: pictures, #, /
_WORD = re.compile(r"[^\W_]+(?:[-'\u2019][^\W_]+)*|(?:[^\w\s.,;:!?\"'()\u2010-\u2027-]|_)")
_LISTED = 8  # words that a message lists


class UnknownWords(UserWarning):
    """The model draws or answers something else than these words say."""


def split_holes(text: str, most: int = MOST_TOKENS, what: str = "text") -> list[str | int]:
    """The words between holes, and for each hole its number of tokens, in order; words without holes are one entry.

    A hole takes the space in front of it with it. Empty strings are left out.

    Args:
        most: tokens that the holes may have. what: the argument, for the message.

    Raises:
        ValueError: `<mask:x>`, `<mask:0>`, `<mask` without its end, `<MASK>`, `[MASK]` and the like, or more than `most`
            hidden tokens in all.
    """
    parts: list[str | int] = []
    place = 0
    for hole in _HOLE.finditer(text):
        count = "1" if hole[1] is None else hole[1].strip()
        if not (count.isascii() and count.isdecimal() and len(count) < 10 and 1 <= int(count) <= most):
            fault = f"{hole[0].strip()!r} is no hole ({what} {short(text)})"
            raise ValueError(f"{fault}; write <mask> or <mask:n> with n from 1 to {most} tokens")
        parts += [_words(text[place : hole.start()], what), int(count)]
        place = hole.end()
    if (total := sum(part for part in parts if isinstance(part, int))) > most:
        raise ValueError(f"{what} {short(text)} hides {total} tokens in all; at most {most} fit")
    return [part for part in [*parts, _words(text[place:], what)] if part != ""]


def has_holes(text: str, what: str = "text") -> bool:
    """Whether a text has holes; errors as of `split_holes`."""
    return any(isinstance(part, int) for part in split_holes(text, what=what))


def all_have_holes(texts: Sequence[str], what: str = "text") -> bool:
    """Whether texts have holes: all or none, since only those without are guided.

    Raises:
        ValueError: some do, or as for `split_holes`.
    """
    holes = [has_holes(text, what) for text in texts]
    if any(holes) and not all(holes):
        fault = f"some {what}s have <mask> holes and some have none, which are decoded apart"
        raise ValueError(f"{fault}; run them apart, one call for each kind")
    return any(holes)


def refuse_holes(texts: Sequence[str], what: str, instead: str) -> None:
    """Raise `ValueError` where a text has holes, well formed or not, and says `instead` what fills them."""
    for text in texts:
        if found := _MEANT.search(text):
            fault = f"{what} {short(text)} holds {found[0]!r}, but holes are not filled there"
            raise ValueError(f"{fault}; {instead}, or leave it out")


def letters_note(texts: Sequence[str]) -> list[str]:
    """A note where a task that takes any text was given what looks like a hole."""
    found = next((match[0] for text in texts if (match := _MEANT.search(text))), None)
    return [] if found is None else [f"{found!r} is read as letters there; infill fills <mask> holes"]


def short(text: str) -> str:
    """A text for a message, cut where it is long."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _words(text: str, what: str) -> str:
    if found := _MEANT.search(text):
        fault = f"{what} {short(text.strip())} holds {found[0]!r}, an unfinished <mask> or another spelling of it"
        raise ValueError(f"{fault}; write <mask> or <mask:n>")
    return text


def words_of(text: str) -> list[str]:
    """The words of a text in order, without punctuation."""
    return _WORD.findall(text)


def between_holes(texts: Sequence[str]) -> list[str]:
    """The words of texts, without their holes and the signs between two of them; errors as of `split_holes`."""
    parts = [split_holes(text) for text in texts]
    return [part for row in parts for part in row if isinstance(part, str) and (len(row) == 1 or words_of(part))]


def unknown_words(texts: Iterable[str], tokenizer: TextTokenizer) -> list[str]:
    """Words that the model does not know, each once, in the order of the texts."""
    known, unknown = tokenizer.known_words, tokenizer.tokenizer.unk_token_id
    found = dict.fromkeys(word for text in texts for word in words_of(text))
    if known is not None:
        meant = {word: tokenizer.normalised(word) for word in found if word not in known}
        return [word for word, other in meant.items() if other not in known and other in (word, word.lower())]
    return [] if unknown is None else [word for word in found if unknown in tokenizer.encode(word)]


def note_on(words: Sequence[str], known: Collection[str] | None) -> str:
    """One sentence about words that a model does not know."""
    small = [word for word in words if known is not None and word.lower() in known]
    new = [word for word in words if word not in small]
    parts = []
    if new:
        parts.append(f"the model does not know {_listed(new)}, so the result may show something else")
    if small:
        parts.append(f"the model knows {_listed(small)} in small letters only")
    if new and known is not None:
        parts.append("`unidiff info` lists all that it knows")
    return "; ".join(parts)


def _listed(words: Sequence[str]) -> str:
    return f"the word{'s' if len(words) > 1 else ''} {few([short(word) for word in words], _LISTED)}"


def notes_on(texts: Iterable[str], tokenizer: TextTokenizer, warned: bool = True) -> list[str]:
    """Notes for a result; where `warned`, they are also given as warnings of Python's, which shows the same one once."""
    texts, known, notes = list(texts), tokenizer.known_words, list[str]()
    if words := unknown_words(texts, tokenizer):
        notes.append(note_on(words, known))
    if known is not None and (bare := [text for text in texts if text.strip() and not words_of(text)]):
        notes.append(f"{bare[0][:40]!r} holds no words, so the result may show anything")
    for note in notes if warned else ():
        warn(note, UnknownWords)
    return notes


class TextTokenizer:
    """A loaded Hugging Face tokenizer with three promises.

    1. `decode(encode(s)) == s` for every Unicode string, when the tokenizer came from `train`: byte-level, no
       normaliser, no prefix space, no clean-up. A tokenizer from the hub keeps its own rules.
    2. Text never becomes a control token: `<|eos|>` typed by a person is encoded as the characters it is made of.
    3. Special tokens have short names: `special("caption")` is the id of `<|caption|>`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if isinstance(tokenizer, type) or not hasattr(tokenizer, "get_vocab"):
            raise ValueError(f"the text tokenizer is {tokenizer!r:.80}; expected a Hugging Face tokenizer")
        self.tokenizer = tokenizer
        self._normaliser: Any = None
        if self.known_words is not None and (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            self._normaliser = backend.normalizer  # of what people type: texts in the model's own words need none
        self._exact = tokenizer
        if self._normaliser is not None:
            self._exact = copy.deepcopy(tokenizer)
            self._exact.backend_tokenizer.normalizer = None
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()
        self.size = 1 + max(self._vocabulary.values(), default=-1)  # the width of the text range in a `Vocabulary`

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
        if "eos" not in specials or len(set(specials)) != len(specials) or not all(specials):
            raise ValueError(f"specials {list(specials)} must be distinct names that include 'eos'")
        if vocab_size < (least := 256 + len(specials)):
            needs = f"256 bytes and {len(specials)} specials need at least {least}"
            raise ValueError(f"vocab_size {vocab_size} is too small: {needs}")
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

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
        """Load a folder, which is never looked up on the network, or what lies on the hub under a name.

        Code that lies there (`auto_map`) is never run, nor is anybody asked about it.

        Args:
            hub_options: revision, cache_dir, token, local_files_only, force_download, subfolder.

        Raises:
            FileNotFoundError: no tokenizer that can be read there, nor a reachable hub name. ValueError: another option.
        """
        if unknown := sorted(set(hub_options) - set(_HUB_OPTIONS)):
            raise ValueError(f"from_pretrained got unknown arguments {unknown}; expected some of {list(_HUB_OPTIONS)}")
        folder = path_of(name)
        if not folder.is_dir() and (folder.is_absolute() or str(name).startswith(".") or len(folder.parts) > 2):
            raise FileNotFoundError(f"text tokenizer folder {str(name)!r} does not exist")
        inside = str(hub_options.pop("subfolder", None) or "")
        if not folder.is_dir():
            from unidiff.hub import download

            folder = download(str(name), _PATTERNS, "tokenizer", **hub_options)
        folder = folder / inside
        if not any((folder / file).is_file() for file in _FILES):
            fault = f"{str(folder)!r} holds no text tokenizer (no tokenizer.json)"
            raise FileNotFoundError(f"{fault}; train one with `unidiff tokenizer text`")
        from transformers import AutoTokenizer

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
            ValueError: `folder` is a file, or holds a tokenizer of another kind. OSError: a full or read-only disk.
        """
        folder = resolve_link(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is a file; name a folder to save the tokenizer in")
        with filling_folder(folder) as temporary:
            self.tokenizer.save_pretrained(temporary)
            check_same_kind(folder, temporary)

    def normalised(self, text: str) -> str:
        """What people type in the words that the model learned, holes kept; what comes out stays as it is. The text itself
        without a normaliser (one in `tokenizer.json` beside a list of known words), if long, or with private characters."""
        if self._normaliser is None or len(text) > LONGEST_TYPED or _PRIVATE.search(text):
            return text
        _check_unicode(text)
        holes = [hole[0].strip() for hole in _HOLE.finditer(text)]
        found = _HOLE.sub(lambda hole: hole[0].replace(hole[0].strip(), HOLE_MARK), text)
        for _ in range(8):  # what one pass takes out may leave something for the next
            before, found = found, self._normaliser.normalize_str(found)
            if found == before:
                break
        own = iter(holes)
        return re.sub(HOLE_MARK, lambda _: next(own), found) if found.count(HOLE_MARK) == len(holes) else text

    def encode(self, text: str) -> list[int]:
        """Text ids of a string, without special tokens; `ValueError` for lone surrogates and for no string.

        A normaliser of what people type is left out, see `normalised`.
        """
        _check_unicode(text)
        return self._exact.encode(text, add_special_tokens=False, split_special_tokens=True)

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
        """The id of a special token by its short name (`eos`, `caption`, ...) or its full text; `ValueError` for none."""
        for candidate in (special_token(name), str(name)):
            if candidate in self._vocabulary and self._vocabulary[candidate] in self.tokenizer.all_special_ids:
                return self._vocabulary[candidate]
        named = getattr(self.tokenizer, f"{name}_token_id", None) if name in ("eos", "bos", "pad", "unk") else None
        if named is None:
            raise ValueError(f"the tokenizer has no special token {name!r:.80}; it has {sorted(self.specials())}")
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


def _check_unicode(text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"expected a string to tokenize, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds the lone surrogate {text[error.start]!r} at character {error.start}; it is not Unicode text"
        ) from error
