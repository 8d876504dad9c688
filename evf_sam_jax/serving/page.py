"""The page: upload, phrases, clicks and boxes in; masks, attention and files out.

Gradio lays it out. What it shows is asked of the same endpoints that programs use, by `page.js` in
the browser: Gradio's own uploads would be files on this machine that requests name by path, and a
mounted Gradio app (6.31) does not check such paths. So of Gradio only what a page without functions
in Python needs is reachable: files that come with it, and the description of the page.
"""

import html
import json
import os
import re
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported, and later

import gradio as gr
import gradio.themes
from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evf_sam_jax import visualize
from evf_sam_jax.serving.asked import Limits

ENDPOINTS = {"/predict": "POST", "/attention": "POST", "/health": "GET"}
GRADIO_FILES = re.compile(
    r"/|/config/?|/theme\.css|/favicon\.ico|/manifest\.json|/robots\.txt|/(assets|static|svelte)/.+"
    r"|/gradio_api/(heartbeat/\w+|startup-events|theme\.css|app_id/?)"
)
# Nothing is loaded from elsewhere. Gradio's own page has scripts and styles in line.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'self'; form-action 'self'"
)
FONTS = ("ui-sans-serif", "system-ui", "sans-serif")  # of the system: none is fetched
MONOSPACE = ("ui-monospace", "monospace")

CLICKS = ["Point inside", "Point outside", "Box"]


def mount_page(api: FastAPI, limits: Limits, name: str) -> ASGIApp:
    """Returns the endpoints with a page at `/`.

    Args:
      name: of the model, shown on the page.
    """
    folder = Path(__file__).parent
    colors = json.dumps(list(visualize.COLORS.values()))
    application = gr.mount_gradio_app(
        api,
        make_page(limits, name),
        path="/",
        footer_links=[],
        run_history=False,
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None},
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        theme=gradio.themes.Default(font=FONTS, font_mono=MONOSPACE).set(
            # Gradio's own grey is too pale on white to be read by everybody.
            body_text_color_subdued="*neutral_500",
            block_info_text_color="*neutral_500",
        ),
        css=(folder / "page.css").read_text(),
        head=f"<script>const EVF_COLORS = {colors};\n{(folder / 'page.js').read_text()}</script>",
    )
    return OnlyThePage(application)


def make_page(limits: Limits, name: str) -> gr.Blocks:
    """The layout; every event is handled by `page.js`."""
    with gr.Blocks(title="EVF-SAM", analytics_enabled=False) as page:
        gr.HTML(
            "<h1>EVF-SAM</h1><p>Say what to find in a picture, point at it, or draw a box around "
            "it.</p>",
            elem_id="evf-title",
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                gr.HTML(PICTURE, elem_id="evf-picture")
                clicks = gr.Radio(
                    CLICKS, value=CLICKS[0], label="Clicks in the picture mean", elem_id="evf-mode"
                )
            with gr.Column(scale=2, min_width=300):
                phrases = gr.Textbox(
                    label="Phrases, one a line",
                    placeholder="the cat on the left\nits tail",
                    info=f"At most {limits.prompts}, each of at most {limits.characters} "
                    "characters. Points and the box belong to each of them.",
                    lines=4,
                    max_lines=limits.prompts,
                    elem_id="evf-phrases",
                )
                with gr.Row():
                    semantic = gr.Checkbox(
                        label="Phrases name categories",
                        info="All of its kind, by the prefix [semantic].",
                        elem_id="evf-semantic",
                    )
                    multimask = gr.Checkbox(
                        label="Three alternatives",
                        info="Of each prompt, for an ambiguous point.",
                        elem_id="evf-multimask",
                    )
                with gr.Row():
                    clear = gr.Button("Clear clicks", elem_id="evf-clear")
                    segment = gr.Button("Segment", variant="primary", elem_id="evf-segment")
                with gr.Tabs():
                    with gr.Tab("Masks"):
                        gr.HTML(MASKS, elem_id="evf-masks")
                    with gr.Tab("Attention"):
                        gr.HTML(ATTENTION, elem_id="evf-attention")
                        attend = gr.Button("Show attention", elem_id="evf-attend")
        gr.HTML(f"<p>Model: {html.escape(name)}</p>", elem_id="evf-model")
        js = "(...values) => {{ evfSam.{}(...values); return []; }}"
        page.load(fn=None, js="() => { evfSam.start(); return []; }")
        clicks.change(fn=None, inputs=[clicks], js=js.format("setMode"))
        clear.click(fn=None, js=js.format("clearClicks"))
        segment.click(fn=None, inputs=[phrases, semantic, multimask], js=js.format("segment"))
        attend.click(fn=None, inputs=[phrases, semantic], js=js.format("attend"))
    return page


PICTURE = """
<div id="evf-drop">
  <canvas id="evf-canvas" width="640" height="400" tabindex="0"
    aria-label="The picture: click for points, drag for a box"></canvas>
  <label id="evf-choose" for="evf-file">
    Drop a picture here, paste it, or <u>choose a file</u>
  </label>
  <input id="evf-file" type="file" accept="image/*">
</div>
<div class="evf-line">
  <label class="evf-link" for="evf-file">Another picture</label>
  <span id="evf-clicks"></span>
</div>
"""
MASKS = """
<p id="evf-status" role="status">Nothing asked yet.</p>
<ol id="evf-legend"></ol>
<p><a id="evf-rle" download="masks.json" hidden>All masks as run lengths (JSON)</a></p>
"""
ATTENTION = """
<p id="evf-attention-status" role="status">Where the model looks for the first phrase: attention of
its last layer from the picture as a whole to the patches.</p>
<canvas id="evf-heat" width="1" height="1" hidden></canvas>
<p><a id="evf-heat-png" download="attention.png" hidden>Attention as PNG</a></p>
"""


class OnlyThePage:
    """Lets through the endpoints and what the page consists of; everything else is a 404."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the start and end of the server
            await self.app(scope, receive, send)
            return
        if (method := ENDPOINTS.get(scope["path"])) is not None:
            # The page is mounted over all paths, and would answer other methods.
            found = scope["method"]
            refused = JSONResponse({"error": f"expected {method}, found {found}"}, 405)
            await (self.app if found == method else refused)(scope, receive, send)
            return
        if scope["method"] not in ("GET", "HEAD") or not GRADIO_FILES.fullmatch(scope["path"]):
            await JSONResponse({"error": "no such page"}, 404)(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = POLICY
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self.app(scope, receive, send_with_policy)
