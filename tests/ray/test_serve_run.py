# SPDX-License-Identifier: Apache-2.0
"""``serve run``, as docs/deploy.md starts the app on one machine."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
from helpers.http_server import serving
from helpers.ray_app import PAGE, reports, shell, wait_for_both
from helpers.readme import block


def test_the_page_s_first_commands(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(block("serve run", PAGE), log, ready=None) as process:
        wait_for_both()
        answer = json.loads(shell(block("curl -s http://127.0.0.1:8000/v1/completions", PAGE)))
        assert answer["choices"][0]["text"].split()[0] == "skwyn"
        ran = [worker for one in reports() for worker in one["workers"]]
        assert sum(one["decode_tokens"] for one in ran) == 7
        assert sum(one["attn_run"][5] + one["mlp_run"][6] + one["attn_run"][7] for one in ran) == 0
        proxies = [
            one.laddr.ip
            for child in psutil.Process(process.pid).children(recursive=True)
            for one in child.net_connections("tcp")
            if one.status == psutil.CONN_LISTEN and one.laddr.port == 8000
        ]
        assert proxies == ["127.0.0.1"]
    assert "vllm-adaskip: AdaSkipLlamaForCausalLM, method none" in log.read_text()
