"""Chat with LLaDA and Dream: the family's template, hidden answers of a fixed length, rows of any lengths in a batch.

    rows = ChatRows(vocabulary, LLADA_CHAT, encode)
    result = run_task(model, vocabulary, rows.ask(["What is a fox?"], answer_length=128), seeds=[0])
    tokenizer.decode(result.texts[0])

An answer ends before its first end-of-text or end of turn. Words never become marks: they are encoded on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from unidiff.decoding.config import ModalityDecoding, SamplerConfig
from unidiff.families.dream.weights import dream_sampler
from unidiff.families.mmada.sampling import answer_config
from unidiff.families.rows import Piece, hidden_text, pieces_batch, text_piece
from unidiff.families.tasks import Encode, Prompt, TaskRequest, prompt_ids, text_targets
from unidiff.tokens.vocabulary import Vocabulary

ROLES = ("system", "user", "assistant")
Message = Mapping[str, str]
Turn = Prompt | Sequence[Message]


def llada_sampler(
    vocabulary: Vocabulary,
    steps: int = 128,
    block_length: int = 32,
    temperature: float = 0.0,
    guidance: float = 0.0,
    threshold: float | None = None,
) -> SamplerConfig:
    """LLaDA's semi-autoregressive decoding, or Fast-dLLM's in parallel.

    Args:
        steps: passes for the whole answer. block_length: tokens per block.
        guidance: upstream `cfg_scale`.
        threshold: commit every token whose confidence reaches it instead of a fixed number per pass.
    """
    config = answer_config(vocabulary, steps, block_length, temperature, guidance)
    if threshold is None:
        return config
    text = ModalityDecoding(
        rule="threshold",
        threshold=threshold,
        temperature=temperature,
        block_length=block_length,
        forbid=config.text.forbid,
    )
    return replace(config, text=text)


@dataclass(frozen=True)
class ChatTemplate:
    """How turns are written; a part is the name of a mark in angle brackets, or words with `{role}` and `{content}`.

    Args:
        marks: ids by name.
        opening: parts before the first turn. turn: parts of a turn. answer: parts that open the answer.
        system: what the system says where a conversation does not begin with it; None for nothing.
        end: the mark that ends a turn.
        sampler: vocabulary to the family's sampler settings.
    """

    marks: Mapping[str, int] = field(default_factory=dict)
    opening: tuple[str, ...] = ()
    turn: tuple[str, ...] = ()
    answer: tuple[str, ...] = ()
    system: str | None = None
    end: str = "eot"
    sampler: Callable[[Vocabulary], SamplerConfig] = llada_sampler


LLADA_CHAT = ChatTemplate(
    marks={"bos": 126080, "start_header": 126346, "end_header": 126347, "eot": 126348},
    opening=("<bos>",),
    turn=("<start_header>", "{role}", "<end_header>", "\n\n{content}", "<eot>"),
    answer=("<start_header>", "assistant", "<end_header>", "\n\n"),
)
DREAM_CHAT = ChatTemplate(
    marks={"im_start": 151644, "im_end": 151645},
    turn=("<im_start>", "{role}\n{content}", "<im_end>", "\n"),
    answer=("<im_start>", "assistant\n"),
    system="You are a helpful assistant.",
    end="im_end",
    sampler=lambda vocabulary: dream_sampler(),
)


@dataclass(frozen=True)
class ChatRows:
    """Builds chat requests.

    Args:
        vocabulary: of the model.
        template: `LLADA_CHAT` or `DREAM_CHAT`.
        encode: text to ids without special ones (`TextTokenizer(...).encode`).
        config: sampler settings; None for the template's.
        left: pad on the left, as the reference programs do, or on the right; the answers are the same.
    """

    vocabulary: Vocabulary
    template: ChatTemplate
    encode: Encode | None = None
    config: SamplerConfig | None = None
    left: bool = True

    def ask(self, turns: Sequence[Turn], answer_length: int = 128) -> TaskRequest:
        """Answer questions or go on with conversations, one per row.

        Args:
            turns: each a question, or messages `{"role": ..., "content": ...}`, or ids that are taken as they are.
            answer_length: tokens to decode, the end of the answer included.

        Raises:
            ValueError: an empty question, an unknown key, or words without `encode`.
        """
        return self._request([self.ids(turn) for turn in turns], answer_length)

    def complete(self, prompts: Sequence[Prompt], answer_length: int = 128) -> TaskRequest:
        """Go on with texts as they are, without the template (base models)."""
        return self._request([prompt_ids(prompt, self.encode) for prompt in prompts], answer_length)

    def infill(self, texts: Sequence[Sequence[int]]) -> TaskRequest:
        """Fill [MASK] in texts of ids, wherever it stands; end-of-text fills no hole."""
        rows = []
        for ids in texts:
            given = [i != self.vocabulary.mask_id for i in ids]
            piece = text_piece(ids)
            rows.append([piece._replace(given=piece.given.new_tensor(given))])
        never = {self.vocabulary.specials[n] for n in ("eos",) if n in self.vocabulary.specials} | {*self._ends}
        config = self._settings()
        text = replace(config.text, forbid=tuple(sorted({*config.text.forbid, *never})))
        batch = pieces_batch(rows, self.left)
        return TaskRequest(batch, replace(config, text=text, stop_at_eos=False, ends=()), batch.valid)

    def ids(self, turn: Turn) -> list[int]:
        """A conversation in the template, up to where the answer begins."""
        check_turns([turn])
        if not isinstance(turn, str) and all(isinstance(part, int) for part in turn):
            return prompt_ids(turn, None)  # type: ignore[arg-type]
        said: list[object] = [{"role": "user", "content": turn}] if isinstance(turn, str) else list(turn)
        messages = [{"role": m["role"], "content": m["content"].strip()} for m in cast("list[Message]", said)]
        if self.template.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.template.system}, *messages]
        ids = self._parts(self.template.opening, {})
        for message in messages:
            ids += self._parts(self.template.turn, message)
        return ids + self._parts(self.template.answer, {})

    @property
    def _ends(self) -> tuple[int, ...]:
        return (self.template.marks[self.template.end],) if self.template.end in self.template.marks else ()

    def _parts(self, parts: Sequence[str], message: Message) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if part.startswith("<"):
                ids.append(self.template.marks[part[1:-1]])
            else:
                words = part.replace("{role}", message.get("role", "")).replace("{content}", message.get("content", ""))
                ids += self._encode(words)
        return ids

    def _encode(self, words: str) -> list[int]:
        if self.encode is None:
            raise ValueError("words need a tokenizer; pass encode=tokenizer.encode, or conversations as ids")
        return list(self.encode(words))

    def _settings(self) -> SamplerConfig:
        if self.config is not None:
            return replace(self.config, ends=(*self.config.ends, *self._ends))
        plain = self.template.sampler(self.vocabulary)
        never = {i for name, i in self.template.marks.items() if name != self.template.end}
        never -= {self.vocabulary.specials.get("eos")}
        text = replace(plain.text, forbid=tuple(sorted({*plain.text.forbid, *never})))
        return replace(plain, text=text, ends=self._ends)

    def _request(self, prompts: Sequence[Sequence[int]], answer_length: int) -> TaskRequest:
        if answer_length < 1:
            raise ValueError(f"answer_length is {answer_length}; expected at least 1")
        rows: list[list[Piece]] = []
        for prompt in prompts:
            if not prompt:
                raise ValueError("the prompt is empty; write at least one word")
            rows.append([text_piece(prompt), hidden_text(answer_length, self.vocabulary)])
        batch = pieces_batch(rows, self.left)
        return TaskRequest(batch, self._settings(), text_targets(batch))


def check_turns(turns: Sequence[object]) -> list[Turn]:
    """Questions, conversations or ids as they are.

    Raises:
        ValueError: anything else, or nothing said; the message names it.
    """
    for number, turn in enumerate(turns):
        name = "the question" if len(turns) == 1 else f"question {number + 1} of {len(turns)}"
        if isinstance(turn, str):
            _check_said(turn, name)
            continue
        if not isinstance(turn, list | tuple) or not turn:
            raise ValueError(f"{name} is {turn!r:.60}; expected a string, or a list of messages with role and content")
        if all(isinstance(part, int) and not isinstance(part, bool) for part in turn):
            if bad := [part for part in turn if not 0 <= part < 2**31]:
                raise ValueError(f"{name} holds the id {bad[0]}, which no vocabulary has")
            continue
        for message in turn:
            if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
                raise ValueError(f"message {message!r:.60} must have exactly a role and a content; write both")
            if message["role"] not in ROLES:
                raise ValueError(f"message role is {message['role']!r:.60}; expected one of {', '.join(ROLES)}")
            _check_said(message["content"], f"the {message['role']} message")
    return list(turns)  # type: ignore[arg-type]


def words_of_turns(turns: Sequence[Turn]) -> list[str]:
    """What is said in checked turns: questions, and the words of every message."""
    said: list[str] = []
    for turn in turns:
        messages = [turn] if isinstance(turn, str) else [part for part in turn if isinstance(part, Mapping)]
        said += [part if isinstance(part, str) else part["content"] for part in messages]
    return said


def _check_said(words: object, name: str) -> None:
    if not isinstance(words, str):
        raise ValueError(f"{name} is {words!r:.60}; expected a string")
    if not words.strip():
        raise ValueError(f"{name} is empty; write at least one word")
    if any("\ud800" <= c <= "\udfff" for c in words):
        raise ValueError(f"{name} holds a lone surrogate, which is no character; leave it out")
