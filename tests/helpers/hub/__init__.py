"""A small Hugging Face Hub that runs in the test process.

The upload and download paths of a trainer end in HTTP calls, and a mocked client would hide every mistake in what is
sent. This server answers the real `huggingface_hub` client over loopback, keeps all files in memory, and refuses what
the real Hub refuses: writes without a token, objects whose hash or size is wrong, binary files that are sent as
text, broken model cards.

`huggingface_hub` reads `HF_ENDPOINT` when it is imported, so the client has to run in a subprocess:

    with HubServer() as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.env(tmp_path / "hf_home"), check=True)
        assert hub.repos["user/model"].files["README.md"].startswith(b"---")
"""

from __future__ import annotations

from helpers.hub.cards import check_card
from helpers.hub.server import HubServer


__all__ = ["HubServer", "check_card"]
