"""The page: gradio's parts, and which of the studio's answers goes where.

Annotations are evaluated here, as gradio reads those of the functions that it calls.
"""

import atexit
import json
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unidiff.errors import import_extra
from unidiff.studio import views
from unidiff.studio.examples import LOAD_PAINTING, example_file, painted_example, thumbnail
from unidiff.studio.fields import painting_field, picture_field
from unidiff.studio.guard import Guard
from unidiff.studio.look import CSS, HEAD, SCROLL, TOGGLE, theme
from unidiff.studio.session import Form, Shown, Studio
from unidiff.studio.tasks import (
    MOST_CANDIDATES,
    MOST_NEW_TOKENS,
    MOST_SEED,
    MOST_STEPS,
    PRESETS,
    StudioTask,
    about_model,
)
from unidiff.studio.uploads import MAX_BYTES

_WELCOME = "Choose what to do, or click an example. You will see every token as it appears."
_QUEUE = 64  # requests of all kinds


def build(studio: Studio, examples: Sequence[Any] = ()) -> Any:
    """The page of a studio, gradio's `Blocks`, to launch with `launch_options`.

    Args:
        examples: of `unidiff.world.TaskExample`, to click.

    Raises:
        ValueError: gradio is not installed.
    """
    import_extra("gradio", "unidiff studio needs gradio; install it with: pip install 'unidiff[demo]'")
    import gradio as gr

    with gr.Blocks(title="unidiff studio", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        _Page(gr, studio, examples).lay_out()

        def left(request: gr.Request) -> None:
            studio.visitors.forget(_name(request))

        page.unload(left)
    return page.queue(max_size=_QUEUE, api_open=False, default_concurrency_limit=_QUEUE)


def launch_options(host: str = "127.0.0.1", port: int = 7860, share: bool = False) -> dict[str, Any]:
    """Arguments of `build(...).launch`: nothing of it depends on the environment, and only what the studio needs is open."""
    from gradio.utils import get_upload_folder
    from starlette.middleware import Middleware

    return {
        "server_name": host,
        "server_port": port,
        "share": share,
        "theme": theme(),
        "css": CSS,
        "max_file_size": MAX_BYTES,
        "app_kwargs": {"middleware": [Middleware(Guard, folder=get_upload_folder())]},
        "state_session_capacity": 500,
        "show_error": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "run_history": False,
        "_frontend": False,  # gradio's look at its own page, which a busy machine or a proxy fails within seconds
        "footer_links": [],
        "inbrowser": False,
    }


def check_port(host: str, port: int) -> None:
    """Raise `ValueError` where nothing can be served."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise ValueError(f"--host {host} --port {port} cannot be served at ({error}); name others") from error


class _Page:
    """Parts of the page, by name."""

    def __init__(self, gr: Any, studio: Studio, examples: Sequence[Any]) -> None:
        self.gr, self.studio, self.examples = gr, studio, examples
        self.folder = Path(tempfile.mkdtemp(prefix="unidiff-studio-"))  # pictures of examples
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)

    def lay_out(self) -> None:
        gr, studio = self.gr, self.studio
        with gr.Row(equal_height=True):
            about = HEAD.replace("{about}", views.escaped(about_model(studio.pipe, studio.model)))
            gr.HTML(about, padding=False, elem_classes="ud-plain")
            dark = gr.Button("◐", size="sm", scale=0, min_width=44, elem_id="ud-dark")
            dark.click(None, js=TOGGLE)
        forms = []
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=330):
                with gr.Tabs():
                    for task in studio.tasks:
                        with gr.Tab(task.title, id=task.name):
                            forms.append((task, self._form(task)))
                self._dial()
            with gr.Column(scale=6, min_width=330):
                self._results()
        self.earlier = gr.HTML(
            "<p>Your results, the newest first</p>", padding=False, visible=False, elem_classes="ud-title"
        )
        self.history = gr.Gallery(
            show_label=False, columns=8, fit_columns=False, allow_preview=False, buttons=[], visible=False,
            object_fit="contain", interactive=False, elem_id="ud-history", format="png", height="auto",
        )  # fmt: skip
        for task, form in forms:
            self._wire(task, form)
        self._watch()

    def _form(self, task: StudioTask) -> dict[str, Any]:
        gr, form = self.gr, dict[str, Any]()
        gr.HTML(f"<p>{views.escaped(task.about)}</p>", padding=False, elem_classes=["ud-plain", "ud-about"])
        if task.name == "chat":
            form["chat"] = gr.Chatbot(height=300, label="Conversation", buttons=[], elem_id="ud-conversation")
        if task.picture:
            made = painting_field if task.mask else picture_field
            more = {} if task.mask else {"height": 300}
            label = "Paint here" if task.mask else "Picture"
            form["picture"] = made(label=label, elem_id=f"ud-picture-{task.name}", **more)
        if task.words:
            form["words"] = gr.Textbox(
                label=task.label, placeholder=task.hint, lines=2, max_lines=6, elem_id=f"ud-words-{task.name}"
            )
        if task.writes:
            form["longest"] = gr.Slider(
                0, MOST_NEW_TOKENS, 64, step=8, label="Longest text, in tokens (0: the usual)", buttons=[]
            )
        with gr.Row():
            form["go"] = gr.Button(task.button, variant="primary", elem_id=f"ud-go-{task.name}")
            form["again"] = gr.Button("Again, other seed", elem_id=f"ud-again-{task.name}")
            if task.name == "chat":
                form["anew"] = gr.Button("New conversation")
        self._examples(task, form)
        return form

    def _examples(self, task: StudioTask, form: dict[str, Any]) -> None:
        """Rows to click. What they put into a field is a plain value: after anything else gradio makes the field anew, without
        what `fields` made of it. Into the editor it goes in the browser: what the server puts there is loaded again with
        every change of the page, and takes strokes away."""
        gr, names = self.gr, [name for name in ("picture", "words") if name in form]
        own = [example for example in self.examples if example.task == task.name]
        if not own or not names:
            return
        parts, rows, values = list[Any](), list[list[str]](), list[list[str]]()
        for example in own:
            part, shown = painted_example(example) if task.picture else (None, None)
            file = [] if shown is None else [example_file(shown, self.folder)]
            parts.append(part)
            rows.append([*file, *([example.words] if task.words else [])])
            values.append(rows[-1][task.mask :])
        chosen = gr.Dataset(
            components=[(gr.Image if name == "picture" else gr.Textbox)(visible=False) for name in names],
            samples=rows, type="index", headers=["Picture" if name == "picture" else task.label for name in names], label="Examples",
            sample_labels=None if task.picture else [example.words or "from nothing" for example in own],
            elem_id=f"ud-examples-{task.name}",
        )  # fmt: skip
        load = LOAD_PAINTING.replace("EDITOR", f"ud-picture-{task.name}").replace("PARTS", json.dumps(parts))
        fields = [form[name] for name in names][task.mask :]

        def put(index: int) -> Any:
            row = values[index if isinstance(index, int) and 0 <= index < len(values) else 0]
            return row if len(row) > 1 else row[0]

        chosen.click(put, chosen, fields, js=load if task.mask else None, **_SILENT)

    def _dial(self) -> None:
        from unidiff.decoding.cache.config import CACHES

        gr = self.gr
        self.preset = gr.Radio(
            list(PRESETS), value="Model's own", label="Speed or quality", elem_id="ud-preset", buttons=[]
        )
        with gr.Accordion("Steps, threshold, cache, candidates", open=False, elem_id="ud-dial"):
            steps = gr.Slider(
                0, MOST_STEPS, 0, step=1, label="Steps (0: the model's own)", elem_id="ud-steps", buttons=[]
            )
            least = gr.Slider(
                0,
                1,
                0,
                step=0.05,
                label="Threshold: commit all that is at least this sure (0: the model's own)",
                buttons=[],
            )
            cache = gr.Dropdown(["auto", *CACHES], value="none", label="Cache between passes", buttons=[])
            count = gr.Slider(
                1, MOST_CANDIDATES, 1, step=1, label="Candidates, the best is kept", buttons=[],
                visible=self.studio.pipe.images is not None,
            )  # fmt: skip
        self.dial = [steps, least, cache, count]
        self.seed = gr.Number(
            0,
            label="Seed: the same gives the same",
            precision=0,
            minimum=0,
            maximum=MOST_SEED,
            elem_id="ud-seed",
            buttons=[],
        )
        self.preset.input(lambda name: PRESETS.get(name, PRESETS["Model's own"]), self.preset, self.dial, **_SILENT)

    def _results(self) -> None:
        gr = self.gr
        self.stage = gr.HTML(views.empty_stage(_WELCOME), elem_id="ud-stage", elem_classes="ud-plain", padding=False)
        with gr.Row(equal_height=True):
            self.moment = gr.Slider(
                0, 1, 0, step=1, label="Step back: pass", interactive=False, elem_id="ud-pass", buttons=[], scale=5
            )
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="ud-stop", scale=1, min_width=90)
        self.status = gr.HTML("", elem_id="ud-status", elem_classes="ud-plain", padding=False)
        self.cost = gr.HTML("", elem_id="ud-cost", elem_classes="ud-plain", padding=False)
        self.files = gr.HTML("", elem_id="ud-files", elem_classes="ud-plain", padding=False)
        with gr.Accordion("The same in Python", open=False, elem_id="ud-python"):
            self.code = gr.Code("", language="python", interactive=False, label="Python", elem_id="ud-code")

    @property
    def _outputs(self) -> list[Any]:
        return [self.stage, self.status, self.cost, self.code, self.moment, self.stop, self.history, self.earlier]

    def _wire(self, task: StudioTask, form: dict[str, Any]) -> None:
        """A form's buttons to a run, and its news to the page."""
        import gradio as gr

        studio, chat = self.studio, form.get("chat")
        names = [name for name in ("words", "picture", "longest") if name in form]
        keys = [{"picture": "sent"}.get(name, name) for name in names]
        inputs = [*(form[name] for name in names), *self.dial, self.seed]
        outputs = [*self._outputs, *([chat] if chat is not None else [])]

        def work(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
            asked = dict(zip([*keys, "steps", "threshold", "cache", "candidates", "seed"], values, strict=True))
            for shown in studio.work(_name(request), task, Form(**asked)):
                said = [studio.visitors.of(_name(request)).said] if chat is not None else []
                yield [*self._update(shown, _name(request)), *said]

        def files(request: gr.Request) -> str:
            return studio.files(_name(request))

        own = {"show_progress": "hidden", "concurrency_limit": _QUEUE, "api_visibility": "private"}
        first = form["go"].click(work, inputs, outputs, trigger_mode="multiple", **own)
        seeded = form["again"].click(lambda: secrets.randbelow(MOST_SEED), None, self.seed, **_SILENT)
        runs = [first, seeded.then(work, inputs, outputs, **own)]
        if "words" in form:
            runs.append(form["words"].submit(work, inputs, outputs, trigger_mode="multiple", **own))
        for button in (form["go"], form["again"]):
            button.click(None, js=SCROLL)  # a telephone shows the form and the result one below the other
        for run in runs:
            run.then(files, None, self.files, show_progress="hidden", concurrency_limit=2, api_visibility="private")
        if "anew" in form:

            def anew(request: gr.Request) -> list[Any]:
                studio.visitors.of(_name(request)).said.clear()
                return []

            form["anew"].click(anew, None, chat, **_SILENT)

    def _watch(self) -> None:
        """Stop, step back, and earlier results."""
        import gradio as gr

        studio = self.studio

        def stop(request: gr.Request) -> None:
            studio.stop(_name(request))

        def step(number: float, request: gr.Request) -> Any:
            shown = studio.show(_name(request), number)
            return gr.skip() if shown.stage is None else shown.stage

        def recall(chosen: gr.SelectData, request: gr.Request) -> list[Any]:
            index = chosen.index if isinstance(chosen.index, int) else -1
            return self._update(studio.recall(_name(request), index), _name(request))

        def files(request: gr.Request) -> str:
            return studio.files(_name(request))

        self.stop.click(stop, None, None, **_SILENT)
        self.moment.input(step, self.moment, self.stage, trigger_mode="always_last", **_SILENT)
        self.history.select(recall, None, self._outputs, **_SILENT).then(files, None, self.files, **_SILENT)

    def _update(self, shown: Shown, name: str) -> list[Any]:
        gr, same = self.gr, self.gr.skip()
        done = shown.last is not None
        moment = same
        if done:
            last = shown.last or 0
            moment = gr.update(maximum=max(1, last), value=shown.number, interactive=last > 0)
        elif shown.busy:
            moment = gr.update(interactive=False)
        return [
            *(same if part is None else part for part in (shown.stage, shown.status, shown.cost, shown.code)),
            moment,
            gr.update(interactive=shown.busy),
            same if shown.record is None else gr.update(value=self._gallery(name), visible=True),
            same if shown.record is None else gr.update(visible=True),
        ]

    def _gallery(self, name: str) -> list[tuple[Any, str]]:
        records = self.studio.visitors.of(name).records
        return [(thumbnail(record.picture), record.done.out.texts[0]) for record in records]


_SILENT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


def _name(request: Any) -> str:
    """The secret name of a page."""
    return str(request.session_hash)
