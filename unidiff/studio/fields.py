"""The two fields for pictures: gradio's, made to hand over bytes instead of opening files themselves.

Methods of the objects are replaced, since gradio writes a file beside the source of every class that inherits from its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from unidiff.studio.examples import INK
from unidiff.studio.uploads import MAX_BYTES, MOST_LAYERS, Sent, stored_bytes

_MOST_KEPT = 64
"""Paintings on their way to the server."""


def picture_field(**options: Any) -> Any:
    """A field for a picture; its value in events is a `Sent`."""
    import gradio as gr

    field = gr.Image(type="filepath", sources=["upload", "clipboard"], buttons=[], **options)
    setattr(field, "preprocess", lambda payload: Sent() if payload is None else _sent(payload))  # noqa: B010
    return field


def painting_field(**options: Any) -> Any:
    """A field for a picture with a brush; its value in events is a `Sent`."""
    import gradio as gr

    brush = gr.Brush(default_size=40, colors=[INK], default_color=INK, color_mode="fixed")
    field = gr.ImageEditor(
        type="filepath",
        sources=["upload", "clipboard"],
        brush=brush,
        eraser=gr.Eraser(default_size=40),
        transforms=(),
        layers=False,
        buttons=[],
        format="png",
        canvas_size=(384, 384),
        **options,
    )

    def opened(payload: Any) -> Sent:
        if payload is None:
            return Sent()
        kept = payload if payload.id is None else field.blob_storage.pop(payload.id, None)
        return Sent() if kept is None else _sent(kept.background, kept.layers or ())

    stored = field.accept_blobs

    def accept_blobs(data: gr.components.image_editor.AcceptBlobs) -> None:
        index = str(data.data.get("index"))
        if (
            (index.isdecimal() and int(index) >= MOST_LAYERS)
            or len(data.files) != 1
            or len(data.files[0][1]) > MAX_BYTES
        ):
            return
        stored(data)
        while len(field.blob_storage) > _MOST_KEPT:  # of people who left in between; the oldest first
            field.blob_storage.pop(next(iter(field.blob_storage)), None)

    setattr(accept_blobs, "_is_server_fn", True)  # noqa: B010
    for name, method in {"preprocess": opened, "accept_blobs": accept_blobs}.items():
        setattr(field, name, method)
    return field


def _sent(picture: Any, layers: Iterable[Any] = ()) -> Sent:
    """Files in the server's own folder, or bytes."""
    from gradio.utils import get_upload_folder

    folder = get_upload_folder()
    parts = [part for part in (picture, *layers) if part is not None]
    try:
        data = [
            bytes(p) if isinstance(p, bytes | bytearray | memoryview) else stored_bytes(p.path, folder) for p in parts
        ]
    except (ValueError, OSError) as error:
        return Sent(fault=str(error))
    if picture is None:
        return Sent(layers=tuple(data))
    return Sent(data[0], tuple(data[1:]))
