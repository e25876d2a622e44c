"""The tasks of a pipeline that write words alone: captions, answers, conversations, texts that go on, and holes in texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from unidiff.families.chat import Turn, check_turns, words_of_turns
from unidiff.families.layout import TaskInputs
from unidiff.pipelines.decode import TaskCall, columns_of, task_method, texts_of
from unidiff.pipelines.inputs import ImageInputs, PictureReader, as_list, opened, size_of
from unidiff.pipelines.options import DecodeKeywords, flag, whole
from unidiff.tokens.text import between_holes


class WordTasks(PictureReader):
    """What `UniDiffPipeline` does with words as results."""

    @task_method
    def caption(
        self, image: Any, max_text_tokens: int | None = None, resize: bool = False, **options: Unpack[DecodeKeywords]
    ) -> TaskCall:
        """Describe pictures; `ValueError` for one of another size, dtype or range, or an option out of range.

        Several in a list inside of the list are described together, where the family reads several.
        """
        longest = self._longest(max_text_tokens)
        if self.layout.reads_pixels:
            flag(resize, "resize")
            seen = pictures_of_rows(image)
            return TaskCall(TaskInputs(len(seen), pictures=seen, longest=longest), pictures=False)
        given = self._read(image, resize)
        return TaskCall(TaskInputs(len(given.codes), codes=given.codes, longest=longest), shown=given.pixels)

    @task_method
    def answer(
        self,
        image: Any,
        question: str | Sequence[str],
        max_text_tokens: int | None = None,
        resize: bool = False,
        **options: Unpack[DecodeKeywords],
    ) -> TaskCall:
        """Answer questions about pictures; `ValueError` as for `caption`, for a question that is empty or too long.

        A question is about as many pictures as a list inside of the list holds: `answer([[first, second]], "what differs?")`,
        where the family reads several.
        """
        said, longest = texts_of(question, "question"), self._longest(max_text_tokens)
        if self.layout.reads_pixels:
            flag(resize, "resize")
            rows = columns_of(1, image=pictures_of_rows(image), question=said)
            inputs = TaskInputs(len(rows["question"]), rows["question"], pictures=rows["image"], longest=longest)
            return TaskCall(inputs, said=said, pictures=False)
        given = self._read(image, resize)
        rows = columns_of(1, image=given.pixels, codes=given.codes, question=said)
        inputs = TaskInputs(len(rows["question"]), rows["question"], codes=rows["codes"], longest=longest)
        return TaskCall(inputs, said=said, shown=rows["image"])

    @task_method
    def chat(
        self,
        messages: Turn | Sequence[Turn],
        max_text_tokens: int | None = None,
        image: Any = None,
        **options: Unpack[DecodeKeywords],
    ) -> TaskCall:
        """Answer in words, of at most 128 tokens where nothing else is asked for.

        Args:
            messages: a question, a conversation (messages `{"role": ..., "content": ...}`), or several of either.
            image: pictures that it is about, where the family reads them: one, or for several conversations one for each; several
                pictures of one conversation are a list inside of the list. `<image>` in what the user says is the place of the
                next picture; without, they stand before the first words of the user.

        Raises:
            ValueError: no message, one of another form, pictures where the family takes none or without a place.
        """
        several = as_list(messages, "message")
        turns = check_turns([several] if all(isinstance(message, Mapping) for message in several) else several)
        longest, shown = self._longest(max_text_tokens, usual=128), dict[str, Any]()
        if image is not None:
            if not self.layout.reads_pixels:
                raise ValueError(
                    f"{self.layout.family} talks without pictures; ask about one with answer, where it can"
                )
            shown = columns_of(1, messages=turns, image=pictures_of_rows(image))
            turns = shown["messages"]
        inputs = TaskInputs(len(turns), turns=turns, pictures=shown.get("image"), longest=longest)
        return TaskCall(inputs, said=words_of_turns(turns), pictures=False)

    @task_method
    def complete(
        self, prompt: str | Sequence[str], max_text_tokens: int | None = None, **options: Unpack[DecodeKeywords]
    ) -> TaskCall:
        """Go on with texts as they are (base models), by at most 128 tokens where nothing else is asked for."""
        said = texts_of(prompt, "prompt", holes=True)
        inputs = TaskInputs(len(said), said, longest=self._longest(max_text_tokens, usual=128))
        return TaskCall(inputs, said=said, pictures=False)

    @task_method
    def infill(self, text: str | Sequence[str], **options: Unpack[DecodeKeywords]) -> TaskCall:
        """Fill `<mask>` holes in texts; `ValueError` for a text without, or an option out of range."""
        said = texts_of(text, "text", holes=True)
        return TaskCall(TaskInputs(len(said), said), said=between_holes(said), pictures=False)

    def _longest(self, max_text_tokens: int | None, text: Any = None, usual: int | None = None) -> int:
        if max_text_tokens is None:
            return usual or self.layout.longest
        if text is not None:
            raise ValueError(
                "max_text_tokens is for texts of unknown length, but text says its own; leave one of them out"
            )
        return whole(max_text_tokens, "max_text_tokens", 1, self.layout.most)


def pictures_of_rows(images: Any) -> list[list[Image.Image]]:
    """The pictures of each row as they are, in RGB: one for each entry of the caller's list, or all of a list in its place.

    Args:
        images: what `opened` takes, or a list of such lists.
    """
    rows = as_list(images, "image")
    if not any(isinstance(row, list | tuple) for row in rows):
        return [[_picture(one)] for one in opened(rows)]
    return [[_picture(one) for one in opened(row)] for row in rows]


def _picture(given: Any) -> Image.Image:
    if isinstance(given, Image.Image):
        return given
    floats = ImageInputs(size_of(given), 1).images(given)  # [1, 3, h, w]
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(floats))[0]
