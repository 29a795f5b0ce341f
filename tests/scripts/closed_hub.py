"""Ask a Hub on loopback for a data set that is not there and for a gated one; prints the errors. Started by the tests."""

import http.server
import os
import threading


class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ.update(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0")  # read at import

from scalekd_hf.data.loading import load_data
from scalekd_hf.tools.recipe import DistillArguments


for name in ("me/missing", "me/gated"):
    try:
        load_data(DistillArguments(dataset=name, student="a", teacher="b"))
    except ValueError as error:
        print(error)
