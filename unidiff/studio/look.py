"""How the page looks: colours for light and dark, one column on a telephone."""

CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
footer { display: none !important; }
.ud-head { display: flex; align-items: center; gap: .9rem; padding: .4rem 0 .2rem; }
.ud-head h1 { font-size: 1.45rem; font-weight: 700; letter-spacing: -.02em; margin: 0; }
.ud-head p { margin: .1rem 0 0; font-size: .86rem; color: var(--body-text-color-subdued); }
.ud-logo { width: 44px; height: 44px; flex: none; border-radius: 11px; display: grid; grid-template-columns: repeat(3, 1fr); gap: 3px;
  padding: 7px; background: linear-gradient(135deg, #4f46e5, #9333ea); }
.ud-logo i { border-radius: 2px; background: rgba(255, 255, 255, .95); } .ud-logo i.o { background: rgba(255, 255, 255, .3); }
.ud-about p { margin: 0; font-size: .9rem; color: var(--body-text-color-subdued); }
.ud-stage { min-height: 18rem; }
.ud-empty { display: grid; place-items: center; border: 1.5px dashed var(--border-color-primary); border-radius: 12px; padding: 2rem; }
.ud-empty p { color: var(--body-text-color-subdued); text-align: center; max-width: 26rem; margin: 0; }
.ud-figures { display: grid; grid-template-columns: 2fr 1fr; gap: 14px; max-width: 34rem; margin: 0 auto; }
.ud-figures figure { margin: 0; min-width: 0; }
.ud-picture { grid-row: span 2; }
.ud-figures img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 10px; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-secondary); display: block; }
.ud-sharp img { image-rendering: pixelated; }
.ud-figures figcaption { font-size: .76rem; color: var(--body-text-color-subdued); margin-top: .3rem; text-align: center; }
.ud-map img { background: repeating-conic-gradient(rgba(128,128,140,.28) 0 25%, rgba(128,128,140,.1) 0 50%) 0 0 / 14px 14px; }
.ud-words { font-size: 1.08rem; line-height: 2; margin: 1rem 0 .2rem; white-space: pre-wrap; text-align: center; overflow-wrap: anywhere; }
.ud-chip { border-bottom: 3px solid var(--sure, transparent); padding: 1px 0; border-radius: 2px; }
.ud-chip.ud-open { background: rgba(128, 128, 140, .3); border-radius: 5px; margin: 0 2px; padding: 1px 7px; border-bottom: 0; }
.ud-chip.ud-new { background: rgba(79, 70, 229, .16); }
.ud-legend { font-size: .74rem; color: var(--body-text-color-subdued); display: flex; flex-wrap: wrap; gap: .3rem .7rem;
  align-items: center; justify-content: center; margin: .7rem 0; }
.ud-scale { width: 4.5rem; height: .6rem; border-radius: 4px; background: linear-gradient(90deg, #440154, #31688e, #35b779, #fde725); }
.ud-swatch { width: .8rem; height: .8rem; border-radius: 3px; display: inline-block; }
.ud-swatch.ud-fresh { background: rgb(234, 115, 23); } .ud-swatch.ud-open { background: rgba(128, 128, 140, .4); }
.ud-bar { height: 6px; border-radius: 3px; background: rgba(128, 128, 140, .22); overflow: hidden; }
.ud-bar i { display: block; height: 100%; border-radius: 3px; background: linear-gradient(90deg, #4f46e5, #9333ea); transition: width .15s; }
.ud-facts { font-size: .8rem; color: var(--body-text-color-subdued); margin: .45rem 0 0; text-align: center; overflow-wrap: anywhere; }
.ud-cost { display: grid; grid-template-columns: repeat(auto-fit, minmax(6.4rem, 1fr)); gap: 8px; }
.ud-cost div { background: var(--background-fill-secondary); border-radius: 10px; padding: .5rem .6rem; text-align: center; }
.ud-cost b { display: block; font-size: 1.05rem; } .ud-cost span { font-size: .74rem; color: var(--body-text-color-subdued); }
.ud-says { margin: 0; padding: .5rem .8rem; border-radius: 10px; font-size: .88rem; background: var(--background-fill-secondary);
  border-left: 3px solid #6366f1; overflow-wrap: anywhere; }
.ud-says.ud-error { border-left-color: #dc2626; background: rgba(220, 38, 38, .1); }
.ud-says.ud-note { border-left-color: #d97706; }
.ud-files { display: flex; flex-wrap: wrap; gap: 8px; }
.ud-file { font-size: .84rem; padding: .34rem .8rem; border-radius: 999px; border: 1px solid var(--border-color-primary);
  color: var(--body-text-color) !important; text-decoration: none !important; background: var(--background-fill-secondary); }
.ud-file:hover { border-color: #6366f1; }
#ud-dark { align-self: center; flex: none; height: 2.2rem; }
#ud-dark { width: 2.6rem; padding: 0; font-size: 1.1rem; } #ud-dark + * { min-width: 0; }
[id^="ud-examples-"] .gallery-item { white-space: normal; text-align: left; }
[id^="ud-examples-"] td { text-align: left; }
#ud-stop { align-self: stretch; }
#ud-history, #ud-history .grid-wrap { max-height: none; min-height: 0; height: auto; }
#ud-history .grid-container { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) !important; }
#ud-history .thumbnail-item { aspect-ratio: 1; } #ud-history img { image-rendering: pixelated; }
.ud-title p { margin: .6rem 0 0; font-weight: 600; font-size: .92rem; }
#ud-status:not(:has(p)), #ud-cost:not(:has(div.ud-cost)), #ud-files:not(:has(a)) { display: none; }
.ud-plain { padding: 0 !important; border: 0 !important; background: none !important; }
@media (max-width: 640px) {
  .gradio-container { padding: 0 !important; } .gradio-container > .main { padding: 10px !important; }
  .ud-head h1 { font-size: 1.2rem; } .ud-logo { width: 36px; height: 36px; }
  .ud-figures { gap: 8px; }
  .tab-wrapper button { padding: 0 7px !important; font-size: .88rem !important; }
  .gradio-container .row > *, .gradio-container .column { min-width: 0; }
}
"""

HEAD = """
<div class="ud-head"><div class="ud-logo" aria-hidden="true"><i></i><i class="o"></i><i></i><i></i><i></i><i class="o"></i>
<i class="o"></i><i></i><i></i></div><div><h1>unidiff studio</h1><p>{about}</p></div></div>
"""

SCROLL = "() => { if (innerWidth < 700) document.querySelector('#ud-stage').scrollIntoView({ behavior: 'smooth' }); }"
TOGGLE = "() => { document.body.classList.toggle('dark'); }"


def theme():
    """gradio's theme of the page; its fonts are those of the system."""
    import gradio as gr

    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    hues = {"primary_hue": "indigo", "secondary_hue": "violet", "neutral_hue": "slate"}
    plain = {
        "none": (
            *("block_title_background_fill", "block_label_background_fill", "block_shadow"),
            *("block_title_background_fill_dark", "block_label_background_fill_dark"),
        ),
        "0": ("block_title_padding",),
    }
    plain |= {"*neutral_600": ("block_title_text_color", "block_label_text_color")}
    plain |= {"*neutral_300": ("block_title_text_color_dark", "block_label_text_color_dark")}
    plain |= {"1px": ("block_border_width",), "600": ("block_title_text_weight", "block_label_text_weight")}
    values = {name: value for value, names in plain.items() for name in names}
    return gr.themes.Soft(**hues, font=fonts, font_mono=mono, radius_size="md").set(**values)
