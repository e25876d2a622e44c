"""What happens between a click and the page: forms become runs, runs become what is shown. No gradio."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from unidiff.errors import explain
from unidiff.studio import views
from unidiff.studio.runs import Failed, Finished, Moment, Run, Worker
from unidiff.studio.snippets import snippet
from unidiff.studio.tasks import Dial, StudioTask, call_arguments, tasks_of
from unidiff.studio.uploads import Sent
from unidiff.studio.visitors import StudioResult, Visitor, Visitors

_FAULT = "something went wrong in unidiff itself; whoever runs this studio finds the reason in its log"


@dataclass(frozen=True)
class Form:
    """A filled-in tab: what was typed and sent, and the dial."""

    words: Any = None
    sent: Sent = field(default_factory=Sent)
    steps: Any = 0
    threshold: Any = 0.0
    cache: Any = "none"
    candidates: Any = 1
    seed: Any = 0
    longest: Any = 0


@dataclass(frozen=True)
class Shown:
    """What the page shows now; None leaves a part as it is.

    Args:
        stage, status, cost, code: HTML, and Python. number, last: of the pass that is shown, and of the last one.
        record: a result that is new. busy: whether the run goes on.
    """

    stage: str | None = None
    status: str | None = None
    cost: str | None = None
    code: str | None = None
    number: int | None = None
    last: int | None = None
    record: StudioResult | None = None
    busy: bool = True


class Studio:
    """A model with everyone who uses it.

    Args:
        pipe: the pipeline. model: as `from_pretrained` takes it. place: what `to` took, "" for the CPU; for code to copy.
    """

    def __init__(self, pipe: Any, model: str, place: str = "", worker: Worker | None = None) -> None:
        self.pipe, self.model, self.place = pipe, model, place
        self.worker, self.visitors, self.tasks = worker or Worker(), Visitors(), tasks_of(pipe)

    def work(self, name: str, task: StudioTask, form: Form) -> Iterator[Shown]:
        """Run a form for the visitor `name`; what goes wrong is said in one sentence. Whoever stops listening frees the place."""
        visitor = self.visitors.of(name)
        try:
            picture, mask = form.sent.opened(self.pipe) if task.picture else (None, None)
            dial = Dial(_whole(form.steps), form.threshold, form.cache, _whole(form.candidates))
            told = (form.words, picture, mask, dial, _whole(form.seed), _whole(form.longest), visitor.said)
            arguments = call_arguments(self.pipe, task, *told)
            run = Run(self.pipe, task.name, arguments)
            visitor.begins(run)
            self.worker.start(run)
        except Exception as error:
            yield Shown(status=views.says(sentence(error), "error"), busy=False)
            return
        try:
            yield Shown(status=views.says(self._waiting(run), "busy"))
            for news in run.events():
                if isinstance(news, Moment):
                    status = views.says("the tokens are appearing ...", "busy")
                    yield Shown(views.stage(self.pipe, news), status, number=news.number)
                elif isinstance(news, Failed):
                    yield Shown(status=views.says(sentence(news.error), "error"), busy=False)
                elif isinstance(news, Finished):
                    yield self._finished(visitor, task, arguments, form, news)
                elif run.left:
                    yield Shown(status=views.says("stopped before it began"), busy=False)
                    return
                else:
                    yield Shown(status=views.says(self._waiting(run), "busy"))
        finally:
            run.leave()

    def stop(self, name: str) -> None:
        """The visitor's run: what is open is filled in one last pass; one that waits is left."""
        run = self.visitors.of(name).run
        if run is not None and not run.begun.is_set():
            run.leave()
        elif run is not None:
            run.stop()

    def show(self, name: str, number: Any) -> Shown:
        """The visitor's result after another pass."""
        record = self.visitors.of(name).current
        if record is None:
            return Shown(busy=False)
        return Shown(record.stage(self.pipe, _whole(number)), number=_whole(number), busy=False)

    def recall(self, name: str, number: int) -> Shown:
        """An earlier result of the visitor, the newest is 0."""
        visitor = self.visitors.of(name)
        if not 0 <= number < len(visitor.records):
            return Shown(status=views.says("that result is gone"), busy=False)
        visitor.current = visitor.records[number]
        return self._whole_record(visitor.current)

    def files(self, name: str) -> str:
        """Links to files of the visitor's result, as HTML."""
        record = self.visitors.of(name).current
        return "" if record is None else views.links(record.files())

    def _waiting(self, run: Run) -> str:
        before = self.worker.before(run)
        people = "one run is" if before == 1 else f"{before} runs are"
        return f"{people} before yours" if before else "the model is at work ..."

    def _finished(
        self, visitor: Visitor, task: StudioTask, arguments: dict[str, Any], form: Form, done: Finished
    ) -> Shown:
        code = snippet(self.model, task.name, arguments, done.stopped, self.place)
        text = form.words.strip() if isinstance(form.words, str) else ""
        title = f"{task.title}: {text}" if text else task.title
        notes = list(done.out.notes)
        if done.stopped is not None:
            notes.insert(0, f"stopped after pass {done.stopped}: what was open was filled in one last pass")
        record = StudioResult(task.name, title, self.model, code, arguments, done, notes)
        visitor.keep(record)
        if task.name == "chat":
            visitor.said += [{"role": "user", "content": text}, {"role": "assistant", "content": done.out.texts[0]}]
        return self._whole_record(record)

    def _whole_record(self, record: StudioResult) -> Shown:
        status = views.says("; ".join(record.notes))
        last = record.last
        return Shown(
            record.stage(self.pipe, last), status, views.cost(record.done), record.code, last, last, record, busy=False
        )


def sentence(error: Exception) -> str:
    """What the page says about an error; what is no fault of the person goes to the log as a whole."""
    said = explain(error)
    if said is None:
        traceback.print_exception(error)
        return _FAULT
    return " ".join(said.split())


def _whole(value: Any) -> Any:
    """A whole number that came as a float; anything else is left to its check."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
