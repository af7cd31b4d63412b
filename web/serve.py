"""Serve the folder of a page to the browsers of this machine.

    python -m web.serve runs/shapes/1-8/mgd-r18/web

It sends the two headers that threads in a browser need: Cross-Origin-Opener-
Policy and Cross-Origin-Embedder-Policy. It serves the files of this folder
alone, and answers this machine alone (127.0.0.1). Ctrl-C ends it.
"""

import errno
import functools
import http.server
import os
import pathlib
import sys

from common import ArgumentParser, UserError, cli, printable

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a folder that is built again is seen at once
}


class Handler(http.server.SimpleHTTPRequestHandler):
    # the tables of some systems lack these, and browsers refuse modules of another type
    extensions_map = {  # noqa: RUF012
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".html": "text/html; charset=utf-8",
        ".mjs": "text/javascript",
        ".json": "application/json",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
        "": "text/plain; charset=utf-8",
    }

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_head(self):
        asked = self.translate_path(self.path)
        folder, path = os.path.realpath(self.directory), os.path.realpath(asked.replace("\0", "?"))  # no path holds one
        if "\0" in asked or (path != folder and not path.startswith(os.path.join(folder, ""))):  # a link that leads out
            self.send_error(404)
            return None
        return super().send_head()

    def list_directory(self, path):
        self.send_error(404)

    def log_request(self, code="-", size="-"):
        """Only what fails is printed, by `log_error`."""


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A browser that goes away, such as one that loads the page again, is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def open_server(folder: pathlib.Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of `folder` on 127.0.0.1, which `serve_forever` starts; port 0 takes a free one. Raises UserError."""
    if not (folder / "index.html").is_file():
        raise UserError(f"{printable(folder)}: holds no index.html; build it with python -m web.build --ckpt FILE --out DIR")
    try:
        return Server(("127.0.0.1", port), functools.partial(Handler, directory=str(folder)))
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        raise UserError(f"--port {port}: {error.strerror}; give another, or 0 for any that is free") from None


def parse_args(argv=None):
    parser = ArgumentParser(__doc__, usage="python -m web.serve DIR [options]")
    parser.add_argument("folder", type=pathlib.Path, metavar="DIR", help="folder that web.build wrote")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 2**16:
        raise UserError(f"--port {args.port}: give 0 to 65535")
    return args


def main(argv=None):
    args = parse_args(argv)
    with open_server(args.folder, args.port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ shows {printable(args.folder)}; Ctrl-C ends the server", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    cli(main)
