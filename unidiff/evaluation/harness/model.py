"""What harnesses ask of a model of whatever family: log-likelihoods of continuations, and texts, also about pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from unidiff.diffusion.likelihood import SCORE_STREAM, model_scorer, nelbo_in_parts
from unidiff.evaluation.harness.asked import Context, Item, Wish
from unidiff.evaluation.harness.settings import HarnessSettings
from unidiff.families.chat import ChatLayout, TextLayout
from unidiff.families.layout import DecodeRequest, TaskInputs
from unidiff.pipeline import UniDiffPipeline
from unidiff.pipelines.decode import TaskCall, decode
from unidiff.pipelines.options import DecodeOptions
from unidiff.pipelines.output import UniDiffOutput
from unidiff.process import pick_device

Found = TypeVar("Found")


class HarnessModel:
    """A pipeline as harnesses use it. What comes out depends on a request alone, not on the batch.

    A request is a row of one of these tasks: texts that go on (`complete`), questions about pictures (`answer`), captions
    (`caption`), questions alone (`chat`), and captions of hidden pictures (`known`), which are only scored.

    Args:
        settings: of the command line. pipe: a pipeline that is loaded already.

    Raises:
        ValueError, FileNotFoundError: as `UniDiffPipeline.from_pretrained`, or a device that is not there.
    """

    def __init__(self, settings: HarnessSettings, pipe: UniDiffPipeline | None = None) -> None:
        self.settings, self.rows = settings, settings.rows
        if pipe is None:
            pipe = UniDiffPipeline.from_pretrained(settings.pretrained, dtype=settings.dtype)
            pipe = pipe.to(pick_device(settings.device))
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.layout = pipe, pipe.layout
        self.templated = False  # whether contexts are in the chat template
        self.half_widths: list[float] = []  # of the 95 % intervals of log-likelihoods, nats

    @property
    def sees(self) -> bool:
        """Whether the model knows pictures."""
        return self.pipe.images is not None or self.layout.reads_pixels

    @property
    def device(self) -> torch.device:
        return next(self.pipe.transformer.parameters()).device

    def about(self) -> dict[str, Any]:
        """What a result should say about the model: where it is from, settings, and how sure its log-likelihoods are."""
        import unidiff

        widths = {} if not self.half_widths else {"mean_half_width": sum(self.half_widths) / len(self.half_widths)}
        own = {name: value for name, value in vars(self.settings).items() if name not in ("options", "max_batch_size")}
        rest = {"family": self.layout.family, "unidiff": unidiff.__version__, "torch": torch.__version__}
        return {**own, **self.settings.options, **rest, "device": str(self.device), **widths}

    def log_likelihoods(self, asked: Sequence[tuple[Context, str]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """For every continuation, as they come: its number, a lower bound of log p(continuation | context) in nats, and
        whether it is what the model would write (False where `check_greedy` is off).

        The mask-count estimator (Nie et al. 2025, arXiv 2502.09992, section 2.4) over `draws` masks, of the words alone, as
        LLaDA's evaluation has it: the end of the text is not scored. Continuations of one context are hidden alike.

        Raises:
            ValueError: what this model cannot be asked, words that it does not hold, or no words.
        """
        items = [self._to_score(number, context, said) for number, (context, said) in enumerate(asked)]
        return self._in_batches(items, self._score_key, self._scores)

    def rolling(self, texts: Sequence[str]) -> Iterator[tuple[int, float]]:
        """For every text, as they come: its number and a lower bound of log p in nats, otherwise as `log_likelihoods`.

        Texts longer than `max_length` are scored in windows of that many tokens, each token once; the last window begins
        with tokens that are known.
        """
        items, owner = list[Item](), list[int]()
        for number, text in enumerate(texts):
            context = Context(text)
            windows: list[tuple[Any, Sequence[int]]]
            if (task := self._task(Context(""))) == "complete":
                windows = list(self._windows(self._encode(text)))
            else:
                windows = [("", self._written(text))]
            for n, (known, words) in enumerate(windows):
                seed = context.seed(self.settings.seed, n)
                items.append(Item(len(items), task, Context(""), known, seed, words, text))
            owner += [number] * len(windows)
        sums, left = [0.0] * len(texts), [owner.count(number) for number in range(len(texts))]
        yield from ((number, 0.0) for number, count in enumerate(left) if not count)  # empty texts
        for number, (value, _) in self._in_batches(items, self._score_key, self._scores):
            own = owner[number]
            sums[own] += value
            left[own] -= 1
            if not left[own]:
                yield own, sums[own]

    def write(self, asked: Sequence[tuple[Context, Mapping[str, Any]]]) -> Iterator[tuple[int, str]]:
        """For every context with its `gen_kwargs` (see `Wish.of`), as they come: its number and the text up to a stop string.

        Raises:
            ValueError: what this model cannot be asked, or words and lengths that it does not hold.
        """
        items, seen = list[Item](), dict[object, int]()
        for number, (context, kwargs) in enumerate(asked):
            task, wish, known = self._task(context), Wish.of(kwargs, self.settings), context.words
            if task == "known":
                raise ValueError(f"{self.layout.family} writes about pictures, and this task has none; use another")
            if task != "complete":
                wish = wish._replace(longest=min(wish.longest, self.layout.most))
            first = context.seed(self.settings.seed)
            seen[first] = again = seen.get(first, -1) + 1
            own = self._cut(self._encode(known), wish.longest) if task == "complete" else known
            items.append(Item(number, task, context, own, context.seed(self.settings.seed, again), wish=wish))
        return self._in_batches(items, lambda item: (*self._place(item), item.wish._replace(until=())), self._texts)

    def chat_text(self, history: Sequence[Mapping[str, str]], answer: bool = True) -> str:
        """A conversation in the model's chat template, up to where the answer begins, or inside its last message.

        Raises:
            ValueError: a model without a chat template, or of single questions that is given a conversation.
        """
        self.templated, layout = True, self.layout
        if isinstance(layout, ChatLayout) and layout.template.marks:
            return layout.written(history, answer)
        if "complete" in layout.tasks:
            raise ValueError(f"{layout.family} has no chat template here; leave --apply_chat_template out")
        if len(history) > 1:
            raise ValueError(f"{layout.family} answers single questions; leave few-shot examples and instructions out")
        return history[0]["content"]

    def _task(self, context: Context) -> str:
        tasks, family, wanted = self.layout.tasks, self.layout.family, self.settings.task
        if len(context.pictures) > 1 and not self.layout.reads_pixels:
            raise ValueError(
                f"a request has {len(context.pictures)} pictures, and {family} takes one; use another task"
            )
        if context.pictures:
            asks = bool(context.words.strip()) and "answer" in tasks
            task = wanted if wanted != "auto" else "answer" if asks else "caption"
            self.layout.need(task)
            return task
        for task in ("complete", "chat"):
            if task in tasks:
                return task
        if "generate" not in tasks or "generate" in self.layout.words_beside:  # which answers a prompt
            raise ValueError(f"{family} needs a picture in every request, and this task has none; use another")
        return "known"

    def _encode(self, text: str) -> list[int]:
        if self.templated and isinstance(self.layout, ChatLayout):
            return self.layout.spelled_ids(text)
        return self.pipe.texts.encode(text)

    def _written(self, text: str) -> Sequence[int]:
        """Ids of a caption or an answer, as rows have them."""
        return self._encode(self.pipe.texts.normalised(text).strip())

    def _cut(self, ids: Sequence[int], more: int) -> Sequence[int]:
        """The end of a context, as much as `max_length` leaves beside `more` tokens."""
        room = self.settings.max_length - more
        if room < 0:
            raise ValueError(f"{more} tokens do not fit into max_length={self.settings.max_length}; give more of it")
        return ids[max(0, len(ids) - room) :]

    def _to_score(self, number: int, context: Context, said: str) -> Item:
        task, known = self._task(context), context.words
        own: Sequence[int] | str = known
        if task == "complete":
            own, words = self._split(known, said)
            own = self._cut(own, len(words))
        elif task == "known":
            first, both = self._written(known), self._written(known + said)
            words, said = both[len(first) :], known + said
        else:
            words = self._written(said)
        if not words:
            raise ValueError(f"a continuation of {known[-40:]!r} has no words to score")
        return Item(number, task, context, own, context.seed(self.settings.seed), words, said)

    def _split(self, context: str, said: str) -> tuple[Sequence[int], Sequence[int]]:
        """Ids of a context and of its continuation, written together.

        Spaces between them are the continuation's, as the harness has it, unless they are the chat template's.
        """
        bare = context if self.templated else context.rstrip()
        said = context[len(bare) :] + said
        first, both = self._encode(bare), self._encode(bare + said)
        return first, both[len(first) :] or self._encode(said)

    def _windows(self, ids: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        most = self.settings.max_length
        for start in range(0, len(ids), most):
            end = min(start + most, len(ids))
            yield ids[max(0, end - most) : start], ids[start:end]

    def _place(self, item: Item) -> tuple[object, ...]:
        """What rows of one batch share: the task, and the size of pictures where they keep their own."""
        sized = item.context.pictures and self.layout.any_size and not self.layout.reads_pixels
        return item.task, item.context.pictures[0].size if sized else None

    def _answers(self, item: Item) -> bool:
        """Whether what is scored is an answer of a row of its task."""
        continuous = self.layout.reads_pixels or self.layout.latents
        return item.task in ("answer", "chat") or (item.task == "caption" and continuous)

    def _score_key(self, item: Item) -> object:
        """Equal numbers of words where rows hold answers of one length, and one draw is all there is of a single word."""
        equal = self._answers(item) or self.settings.check_greedy
        return *self._place(item), len(item.words) if equal else len(item.words) == 1

    def _in_batches(
        self, items: Sequence[Item], key: Callable[[Item], object], work: Callable[[list[Item]], Sequence[Found]]
    ) -> Iterator[tuple[int, Found]]:
        """Numbers and results of `work`, which gets rows of one key; the longest first, so that too many show at once."""
        groups = dict[object, list[Item]]()
        for item in items:
            groups.setdefault(key(item), []).append(item)
        for group in groups.values():
            group.sort(key=lambda item: -len(item.known) - len(item.words))
            while group:
                part = group[: self.rows]
                try:
                    found = work(part)
                except torch.OutOfMemoryError:
                    if self.settings.batch_size is not None or len(part) == 1:
                        raise
                    self.rows = len(part) // 2
                    continue
                del group[: len(part)]
                yield from zip((item.number for item in part), found, strict=True)

    @torch.no_grad()
    def _scores(self, items: Sequence[Item]) -> list[tuple[float, bool]]:
        request, targets = self._known_rows(items)
        seeds, vocabulary = torch.tensor([item.seed for item in items]), self.layout.vocabulary
        model = self.layout.prepared(self.pipe, request, request.config, seeds).model
        judge, batch = model_scorer(model, vocabulary, time=lambda share: share), request.batch.replace(given=~targets)
        single = len(items[0].words) == 1  # any draw hides it
        own = seeds, 0, 1 if single else self.settings.draws, SCORE_STREAM, len(items), self.device
        found = nelbo_in_parts(judge, batch, vocabulary, *own)
        if single or self.settings.draws > 1:
            self.half_widths += [0.0] * len(items) if single else found.error.tolist()
        greedy = self._greedy(items) if self.settings.check_greedy else [False] * len(items)
        return list(zip((-found.total).tolist(), greedy, strict=True))

    def _known_rows(self, items: Sequence[Item]) -> tuple[DecodeRequest, Tensor]:
        """Rows that are known in full, and bool `[B, L]`, what is scored."""
        task, layout, count = items[0].task, self.layout, len(items)
        if task == "complete":
            request = layout.known(TaskInputs(count, [i.words for i in items], turns=[i.known for i in items]))  # type: ignore[misc]
            return request, request.words
        if self._answers(items[0]):
            length = len(items[0].words)
            request = layout.request(task, self._inputs(items, length))
            if bool((request.words.sum(1) != length).any()):
                raise ValueError(f"a question leaves no room for an answer of {length} tokens; shorten it")
            ids = request.batch.ids.clone()
            ids[request.words] = torch.tensor([i.words for i in items]).flatten() + layout.vocabulary.text[0]
            return replace(request, batch=request.batch.replace(ids=ids)), request.words
        codes = self._inputs(items, None).codes if task == "caption" else None
        request = layout.known(TaskInputs(count, [item.said for item in items], codes=codes))
        place = request.words.flip(1).cumsum(1).flip(1)  # 1 for the last word
        return request, request.words & (place <= torch.tensor([len(item.words) for item in items])[:, None])

    def _arguments(self, items: Sequence[Item], longest: int | None) -> dict[str, Any]:
        """What the pipeline's method of a task is given."""
        task, contexts = items[0].task, [item.context.words for item in items]
        if task == "chat":
            return {"messages": contexts, "max_text_tokens": longest}
        several = self.layout.reads_pixels
        images = [list(item.context.pictures) if several else item.context.pictures[0] for item in items]
        shown = {"image": images, "max_text_tokens": longest, "resize": True}
        return shown | ({"question": contexts} if task == "answer" else {})

    def _inputs(self, items: Sequence[Item], longest: int | None) -> TaskInputs:
        """The arguments, read and checked by the pipeline's method, but not decoded."""
        method: Any = getattr(UniDiffPipeline, items[0].task)
        return method.__wrapped__(self.pipe, **self._arguments(items, longest)).inputs

    def _decode(self, items: Sequence[Item], longest: int, options: Mapping[str, Any]) -> UniDiffOutput:
        task, seeds = items[0].task, [item.seed for item in items]
        if task != "complete":
            method = getattr(self.pipe, task)
            return method(**self._arguments(items, longest), generator=seeds, output_type="codes", **options)
        call = TaskCall(TaskInputs(len(items), [i.known for i in items], longest=longest), pictures=False)  # type: ignore[misc]
        return decode(self.pipe, task, call, DecodeOptions(generator=seeds, **options))

    def _greedy(self, items: Sequence[Item]) -> list[bool]:
        length = len(items[0].words)
        if items[0].task in ("caption", "known"):
            raise ValueError("check_greedy is for texts and answers; leave it out with captions")
        out = self._decode(items, length, {**self.settings.options, "temperature": 0.0, "steps": length})
        return [ids == list(item.words) for ids, item in zip(out.text_ids, items, strict=True)]

    def _texts(self, items: Sequence[Item]) -> list[str]:
        wish, texts = items[0].wish, self.pipe.texts
        options = dict(wish.options)
        if items[0].task == "complete" and any(item.wish.until for item in items) and self._lasting:
            options["callback_on_step_end"] = Stopper(self.pipe, items, wish.longest)
        out = self._decode(items, wish.longest, options)
        found = [texts.decode([i for i in ids if i < texts.size]) for ids in out.text_ids]
        if items[0].task != "complete":
            found = [text.strip() for text in found]
        return [item.wish.cut(text) for text, item in zip(found, items, strict=True)]

    @property
    def _lasting(self) -> bool:
        """Whether a token that was written stays as it is."""
        return not getattr(self.pipe.scheduler, "changes", True) and self.layout.config.text.remask == "none"  # type: ignore[attr-defined]


class Stopper:
    """Ends a decode when every row has its stop string among words before which nothing is open.

    Args:
        items: rows of `complete`. longest: tokens that each writes.
    """

    tensor_inputs = ("ids", "open")

    def __init__(self, pipe: UniDiffPipeline, items: Sequence[Item], longest: int) -> None:
        layout = pipe.layout
        assert isinstance(layout, TextLayout)
        length = max(len(item.known) for item in items)
        starts = [length if layout.left else len(item.known) for item in items]
        self.parts = [slice(start, start + longest) for start in starts]
        self.texts, self.untils = pipe.texts, [item.wish.until for item in items]
        self.ends = {layout.vocabulary.specials.get("eos"), *layout.ends}
        self.left = set(range(len(items)))

    def __call__(self, pipe: Any, step: int, t: float, tensors: Mapping[str, Tensor]) -> bool | None:
        self.left = {row for row in self.left if not self._stopped(row, tensors)}
        return None if self.left else False

    def _stopped(self, row: int, tensors: Mapping[str, Tensor]) -> bool:
        part, words = self.parts[row], list[int]()
        for i, hidden in zip(tensors["ids"][row, part].tolist(), tensors["open"][row, part].tolist(), strict=True):
            if hidden:
                break
            if i in self.ends:
                return True
            words.append(i)
        text = self.texts.decode([i for i in words if i < self.texts.size])
        return any(stop in text for stop in self.untils[row])
