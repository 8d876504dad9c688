"""The command that serves a model: a page for people, and the same by HTTP.

    python -m evf_sam_jax.serve --model DIR

Images and masks stay in memory: nothing that is sent is written to disk but what a form's parser
spools into a file without a name. It listens to this machine alone unless `--host` says otherwise,
knows no users and no encryption: before it is offered to a network, put a proxy that does in front.
A request counts among `--max_requests` from its first byte, so as many clients that send slowly
keep others out, each for a minute at most: let the proxy read whole requests before it passes them.
"""

import contextlib
import importlib.util
import os
import socket
from collections.abc import Callable, Iterator

from absl import flags

from evf_sam_jax import compilation_cache
from evf_sam_jax.errors import UserError, run_app
from evf_sam_jax.models.quantized import CHOICES as INT8_CHOICES
from evf_sam_jax.predictor import TOKEN_BUCKETS, Predictor

try:  # what the extra `serve` installs
    import uvicorn
    from starlette.types import ASGIApp

    from evf_sam_jax.serving.app import guarded, make_api
    from evf_sam_jax.serving.asked import Limits
    from evf_sam_jax.serving.batcher import Batcher, Batching
except ModuleNotFoundError as error:
    if error.name and error.name.startswith("evf_sam_jax"):
        raise
    _MISSING = error.name
else:
    _MISSING = None


def define_flags() -> None:
    """Only where this file is the command, so that whoever imports it keeps these names free."""
    compilation_cache.define_flag()
    flags.DEFINE_string("model", None, "The model directory.")
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "float32: exact; bfloat16: half the memory."
    )
    flags.DEFINE_enum(
        "int8",
        "",
        ["", *INT8_CHOICES],
        "Linear layers in 8 bits, their inputs too or not; needs the extra int8.",
    )
    flags.DEFINE_string("host", "127.0.0.1", "The address to listen to; 0.0.0.0 is all.")
    flags.DEFINE_integer("port", 7860, "The port to listen to; 0 takes a free one.", 0, 65535)
    flags.DEFINE_boolean("page", True, "Whether / is a page for people.")
    flags.DEFINE_boolean(
        "warm_up",
        True,
        "Whether to compile before the first answer what phrases of up to 16 tokens need and, with "
        "--page, a box or a point; the rest is compiled when it is first asked.",
    )
    flags.DEFINE_integer("max_requests", 32, "The most requests at a time; others get a 429.", 1)
    flags.DEFINE_integer("max_images", 4, "The most different images of a batch.", 1)
    flags.DEFINE_integer("max_upload_mb", 16, "The largest image file, in MiB.", 1)
    flags.DEFINE_integer("max_pixels", 25_000_000, "The most pixels of an image.", 1)
    flags.DEFINE_integer("max_prompts", 16, "The most phrases of a request.", 1)


def main(argv: list[str]) -> None:
    """Checks the flags, loads the model, and serves until it is told to stop."""
    options = flags.FLAGS
    if argv[1:]:
        raise UserError(f"expected flags only, found {argv[1]!r}")
    if not options.model:
        raise UserError("--model: expected a path, found nothing")
    if _MISSING:
        raise UserError(
            f'expected {_MISSING}, which serving needs, found none: pip install ".[serve]"'
        )
    if options.page and importlib.util.find_spec("gradio") is None:
        raise UserError(
            'expected gradio, which the page needs, found none: pip install ".[serve]", or --nopage'
        )
    limits = Limits(
        upload_bytes=options.max_upload_mb << 20,
        pixels=options.max_pixels,
        prompts=options.max_prompts,
    )
    batching = Batching(requests=options.max_requests, images=options.max_images)
    compilation_cache.keep_compiled()
    with listening(options.host, options.port) as listener:
        predictor = Predictor.load(options.model, dtype=options.dtype, int8=options.int8)
        if options.warm_up:
            predictor.warm_up(
                batching.images, limits.prompts, TOKEN_BUCKETS[0], points=options.page
            )
        serve(
            predictor,
            listener,
            limits,
            batching,
            name=os.path.basename(os.path.abspath(options.model)),
            page=options.page,
            ready=lambda url: print(f"serving {options.model} at {url}", flush=True),
        )


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens, before a model is loaded for it; UserError if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host, --port: cannot listen to {host} {port}: {reason}") from None
    with listener:
        yield listener


def serve(
    predictor: Predictor,
    listener: socket.socket,
    limits: "Limits",
    batching: "Batching",
    name: str,
    page: bool = True,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves a model until SIGINT or SIGTERM, then answers what it has admitted.

    Args:
      name: what the page and /health call the model.
      ready: called with the address when it is about to accept requests.
    """
    host, port = listener.getsockname()[:2]
    with Batcher(predictor, batching) as batcher:
        application = make_application(batcher, limits, name, page)
        config = uvicorn.Config(
            application,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            ws="none",
        )
        ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        uvicorn.Server(config).run(sockets=[listener])


def make_application(batcher: "Batcher", limits: "Limits", name: str, page: bool) -> "ASGIApp":
    """Returns what a server runs: the endpoints, the page if it is wanted, the limits."""
    api = make_api(batcher, limits, name)
    if not page:
        return guarded(api, limits)
    from evf_sam_jax.serving.page import mount_page  # takes seconds

    return guarded(mount_page(api, limits, name), limits)


if __name__ == "__main__":
    define_flags()
    run_app(main)
