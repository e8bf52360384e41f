"""Evaluates three local questions against a server of this process that always answers alike."""

import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from evalscope import TaskConfig, run_task


class Answers(BaseHTTPRequestHandler):
    """An OpenAI endpoint whose model says ``four``."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        choice = {"index": 0, "message": {"role": "assistant", "content": "four"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        body = json.dumps(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
                "usage": usage,
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        """Say nothing."""


def main(payload: dict) -> dict:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"query": "2 + 2?", "response": answer} for answer in ("four", "four", "nothing alike")]
        (Path(folder) / "smoke.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        config = TaskConfig(
            model="m",
            api_url=f"http://127.0.0.1:{server.server_port}/v1",
            api_key="none",
            eval_type="openai_api",
            datasets=["general_qa"],
            dataset_args={"general_qa": {"local_path": folder, "subset_list": ["smoke"]}},
            work_dir=str(Path(folder) / "out"),
            generation_config={"stream": False},
        )
        run_task(config)
        reports = list((Path(folder) / "out").rglob("reports/**/*.json"))
        report = json.loads(reports[0].read_text())
    server.shutdown()
    rouge = max(
        metric["score"] for metric in report["metrics"] if "rouge" in metric["identity"]["name"].lower()
    )
    if not 0.6 < rouge < 0.7:
        raise ValueError(f"two of three answers are right, but the best ROUGE is {rouge}")
    return {"rows": report["metrics"][0]["num"], "rouge": round(rouge, 3)}
