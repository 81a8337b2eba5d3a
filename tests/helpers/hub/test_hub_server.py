"""The Hub of the tests has to be right itself, or the tests that use it prove nothing."""

import hashlib
import http.client
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from helpers.hub import HubServer, check_card


CARD = (
    "---\nlicense: mit\nlibrary_name: peft\ntags:\n- lora\n- test\nmetrics:\n- name: x\n  value: 1\n---\n# A model\n"
)

ROUND_TRIP = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, upload_folder
from huggingface_hub.utils import send_telemetry

folder, out = Path(sys.argv[1]), Path(sys.argv[2])
api = HfApi()
send_telemetry("ping", library_name="test")
result = {"name": api.whoami()["name"]}
url = api.create_repo("user/demo", exist_ok=True)
api.create_repo("user/demo", exist_ok=True)
result["repo_id"] = url.repo_id

first = upload_folder(repo_id="user/demo", folder_path=folder, commit_message="first upload")
again = upload_folder(repo_id="user/demo", folder_path=folder, commit_message="nothing new")
result["same_commit"] = first.oid == again.oid
result["listed"] = sorted(api.list_repo_files("user/demo"))
info = api.model_info("user/demo", files_metadata=True)
result["sha_matches"] = info.sha == first.oid
result["library_name"], result["tags"] = info.library_name, info.tags
result["lfs"] = {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs}
result["folder"] = sorted(f.path for f in api.list_repo_tree("user/demo", "sub"))
result["commits"] = [c.title for c in api.list_repo_commits("user/demo")]
result["exists"] = [api.file_exists("user/demo", "config.json"), api.file_exists("user/demo", "nope.json")]

snapshot_download("user/demo", local_dir=out / "first")
(folder / "config.json").write_text('{"r": 16}')
upload_folder(
    repo_id="user/demo", folder_path=folder, commit_message="second upload", delete_patterns="*.png",
    ignore_patterns="*.png",
)
cached = hf_hub_download("user/demo", "config.json")
result["second_config"] = Path(cached).read_text()
result["first_config"] = Path(hf_hub_download("user/demo", "config.json", revision=first.oid)).read_text()
result["second_listed"] = sorted(api.list_repo_files("user/demo"))
(out / "result.json").write_text(json.dumps(result))
"""

REFUSALS = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as e:
        response = getattr(e, "response", None)
        return [type(e).__name__, None if response is None else response.status_code]
    return None

api, wrong, nobody = HfApi(), HfApi(token="hf_wrong"), HfApi(token=False)
result = {
    "missing info": error(api.model_info, "user/missing"),
    "missing file": error(hf_hub_download, "user/missing", "config.json"),
    "missing snapshot": error(snapshot_download, "user/missing"),
    "missing upload": error(api.upload_file, path_or_fileobj=b"{}", path_in_repo="a.json", repo_id="user/missing"),
    "private": error(nobody.model_info, "user/private"),
    "entry": error(hf_hub_download, "user/public", "nope.json"),
    "revision": error(hf_hub_download, "user/public", "config.json", revision="nope"),
    "delete": error(api.delete_file, "nope.json", "user/public"),
    "wrong whoami": error(wrong.whoami),
    "wrong read": error(wrong.model_info, "user/public"),
    "wrong create": error(wrong.create_repo, "user/new"),
    "no create": error(nobody.create_repo, "user/new"),
    "no upload": error(nobody.upload_file, path_or_fileobj=b"{}", path_in_repo="a.json", repo_id="user/public"),
    "other create": error(api.create_repo, "other/new"),
    "pull request": error(
        api.upload_file, path_or_fileobj=b"{}", path_in_repo="a.json", repo_id="user/public", create_pr=True
    ),
    "bad card": error(
        api.upload_file, path_or_fileobj=b"---\\nbase_model: /tmp/model\\n---\\n", path_in_repo="README.md",
        repo_id="user/public",
    ),
    "public read": error(nobody.hf_hub_download, "user/public", "config.json"),
}
Path(sys.argv[1]).write_text(json.dumps(result))
"""


def run_client(hub: HubServer, tmp_path: Path, code: str, *args: Path) -> None:
    """Run client code in a process of its own, because the client reads its settings when it is imported."""
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=hub.env(tmp_path / "hf_home"), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def call(url: str, data: bytes | dict[str, Any], method: str = "POST", token: str | None = "hf_dummy") -> Any:
    """Send a request without the Hub client, to try what the client would never send."""
    headers = {"Content-Type": "application/x-ndjson" if isinstance(data, bytes) else "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    request = urllib.request.Request(url, data=body, headers=headers, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=10) as response:
        content = response.read()
    return json.loads(content) if content else None


def status(url: str, data: bytes | dict[str, Any], method: str = "POST", token: str | None = "hf_dummy") -> int:
    """Return the status of a request that the server has to refuse."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        call(url, data, method, token)
    with caught.value as error:
        return error.code


def commit_body(*operations: dict[str, Any]) -> bytes:
    """Write a commit the way the client does, one JSON object a line."""
    header = {"key": "header", "value": {"summary": "test", "description": ""}}
    return b"".join(json.dumps(line).encode() + b"\n" for line in (header, *operations))


def test_upload_and_download(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    safetensors = pytest.importorskip("safetensors.numpy")
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text('{"r": 8}')
    (folder / "empty.txt").write_bytes(b"")
    (folder / "sub" / "image one.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    safetensors.save_file({"a": np.arange(5000, dtype=np.float32)}, folder / "adapter_model.safetensors")
    sent = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    out = tmp_path / "out"
    out.mkdir()

    with HubServer() as hub:
        run_client(hub, tmp_path, ROUND_TRIP, folder, out)
        repo = hub.repos["user/demo"]

    result = json.loads((out / "result.json").read_text())
    everything = sorted([".gitattributes", *sent])
    assert result["name"] == "user" and result["repo_id"] == "user/demo"
    assert result["same_commit"] and result["sha_matches"]
    assert result["listed"] == everything
    assert result["library_name"] == "peft" and result["tags"] == ["lora", "test"]
    large = ("adapter_model.safetensors", "sub/image one.png")
    assert result["lfs"] == {path: hashlib.sha256(sent[path]).hexdigest() for path in large}
    assert result["folder"] == ["sub/image one.png"]
    assert result["commits"] == ["first upload", "initial commit"]
    assert result["exists"] == [True, False]
    assert {path: (out / "first" / path).read_bytes() for path in sent} == sent
    assert (result["first_config"], result["second_config"]) == ('{"r": 8}', '{"r": 16}')
    assert result["second_listed"] == [path for path in everything if not path.endswith(".png")]

    assert repo.commits == ["initial commit", "first upload", "second upload"]
    assert repo.files["adapter_model.safetensors"] == sent["adapter_model.safetensors"]
    assert repo.files["config.json"] == b'{"r": 16}'
    assert repo.lfs_files == {"adapter_model.safetensors"}
    assert any(method == "PUT" for method, _ in hub.requests)
    assert ("POST", "/api/models/user/demo/commit/main") in hub.requests


def test_refusals(tmp_path: Path) -> None:
    with HubServer() as hub:
        hub.add_repo("user/public", {"config.json": b"{}"})
        hub.add_repo("user/private", {"config.json": b"{}"}, private=True)
        run_client(hub, tmp_path, REFUSALS, tmp_path / "result.json")
        assert sorted(hub.repos) == ["user/private", "user/public"]
        assert hub.repos["user/public"].commits == ["initial commit", "add files"]

    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {
        "missing info": ["RepositoryNotFoundError", 404],
        "missing file": ["RepositoryNotFoundError", 404],
        "missing snapshot": ["RepositoryNotFoundError", 404],
        "missing upload": ["RepositoryNotFoundError", 404],
        "private": ["RepositoryNotFoundError", 404],
        "entry": ["RemoteEntryNotFoundError", 404],
        "revision": ["RevisionNotFoundError", 404],
        "delete": ["RemoteEntryNotFoundError", 404],
        "wrong whoami": ["HfHubHTTPError", 401],
        "wrong read": ["HfHubHTTPError", 401],
        "wrong create": ["HfHubHTTPError", 401],
        "no create": ["HfHubHTTPError", 401],
        "no upload": ["HfHubHTTPError", 401],
        "other create": ["HfHubHTTPError", 403],
        "pull request": ["HfHubHTTPError", 501],
        "bad card": ["ValueError", None],
        "public read": None,
    }


def test_objects_are_checked() -> None:
    data = b"\0" * 100
    oid = hashlib.sha256(data).hexdigest()
    with HubServer() as hub:
        repo = hub.add_repo("user/demo")
        batch_url = f"{hub.url}/user/demo.git/info/lfs/objects/batch"
        batch = {"operation": "upload", "transfers": ["basic"], "hash_algo": "sha256"}
        batch["objects"] = [{"oid": oid, "size": len(data)}]
        commit_url = f"{hub.url}/api/models/user/demo/commit/main"
        line = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": oid, "size": len(data)}}

        assert status(batch_url, batch, token=None) == 401
        assert status(commit_url, commit_body(line)) == 400  # the object was never sent
        actions = call(batch_url, batch)["objects"][0]["actions"]
        upload, verify = actions["upload"]["href"], actions["verify"]["href"]
        assert status(f"{hub.url}/lfs-upload/guess", data, "PUT", token=None) == 403
        assert status(upload, b"\1" * 100, "PUT", token=None) == 400  # wrong hash
        assert status(upload, data[:-1], "PUT", token=None) == 400  # wrong size
        assert status(verify, {"oid": oid, "size": 100}) == 400
        call(upload, data, "PUT", token=None)
        call(verify, {"oid": oid, "size": 100})
        assert status(verify, {"oid": oid, "size": 99}) == 400
        assert status(commit_url, commit_body(line), token=None) == 401
        assert status(commit_url, b"not json") == 400

        binary = {"key": "file", "value": {"path": "b.txt", "content": "AAAA", "encoding": "base64"}}
        text = {"key": "file", "value": {"path": "c.txt", "content": "YQ==", "encoding": "base64"}}
        outside = {"key": "file", "value": {"path": "../c.txt", "content": "YQ==", "encoding": "base64"}}
        missing = {"key": "deletedFile", "value": {"path": "nope.txt"}}
        assert status(commit_url, commit_body(text, binary)) == 400
        assert status(commit_url, commit_body(text, outside)) == 400
        assert status(commit_url, commit_body(text, missing)) == 404
        assert set(repo.files) == {".gitattributes"}  # a refused commit changes nothing

        call(commit_url, commit_body(line, text))
        assert repo.files["a.bin"] == data and repo.files["c.txt"] == b"a"
        assert "actions" not in call(batch_url, batch)["objects"][0]  # known objects are not sent twice
        url = hub.url
        kept_open = http.client.HTTPConnection("127.0.0.1", int(url.rsplit(":")[-1]), timeout=10)
        kept_open.request("GET", "/api/models/user/demo")
        assert json.loads(kept_open.getresponse().read())["sha"] == repo.sha

    with pytest.raises((OSError, http.client.HTTPException)):  # also for a client that holds its connection
        kept_open.auto_open = 0
        kept_open.request("GET", "/api/models/user/demo")
        kept_open.getresponse()
    kept_open.close()
    with pytest.raises(urllib.error.URLError):
        call(f"{url}/api/whoami-v2", b"", "GET")
    with pytest.raises(RuntimeError):
        _ = hub.url


@pytest.mark.parametrize(
    ("text", "card", "errors", "warnings"),
    [
        (CARD, {"license": "mit", "library_name": "peft", "tags": ["lora", "test"]}, 0, 0),
        ("# No metadata", {}, 0, 1),
        ("---\n{}\n---\n", {}, 0, 1),
        ("---\nlicense: mit\n", {}, 1, 0),
        ("---\nlicense: mit\nlicense: mit\n---\n", {"license": "mit"}, 1, 0),
        ("---\nnot yaml\n---\n", {}, 1, 0),
        ("---\nbase_model: org/name\ntags: [a, 'b']\n---\n", {"base_model": "org/name", "tags": ["a", "b"]}, 0, 0),
        ("---\nbase_model: /tmp/name\n---\n", {"base_model": "/tmp/name"}, 1, 0),
        ("---\ndatasets:\n- org/data\n- /tmp/data\n---\n", {"datasets": ["org/data", "/tmp/data"]}, 1, 0),
        ("---\nbase_model:\n- ./name\n---\n", {"base_model": ["./name"]}, 1, 0),
        ("---\nbase_model: null\nwidget:\n- text: x\n  output:\n    url: a.png\n---\n", {"base_model": None}, 0, 0),
    ],
)
def test_cards_are_checked(text: str, card: dict[str, Any], errors: int, warnings: int) -> None:
    found, found_errors, found_warnings = check_card(text)
    assert (found, len(found_errors), len(found_warnings)) == (card, errors, warnings)
