"""The committed schema is what the real server offers. To accept a change on purpose, run with UPDATE_SNAPSHOT=1."""

import json
import os

import pytest
from comfyui_server import Server
from schema_snapshot import SNAPSHOT, excerpt, load_snapshot


def test_the_real_server_offers_the_committed_schema(server: Server):
    offered = json.loads(json.dumps(excerpt(server.get("/object_info"))))
    if os.environ.get("UPDATE_SNAPSHOT"):
        SNAPSHOT.write_text(json.dumps(offered, indent=1, ensure_ascii=False) + "\n", "utf-8")
        pytest.skip(f"wrote {SNAPSHOT}")
    committed = load_snapshot()
    assert set(offered) == set(committed)
    for name, schema in committed.items():
        assert offered[name] == schema, name
