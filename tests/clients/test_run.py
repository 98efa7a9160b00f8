"""The command that runs the clients: what it installs, what it says, when it is red."""

import pytest

from tests.clients import run
from tests.clients.run import CLIENTS, HERE, ROOT, Result, requirements


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_has_a_test_file_and_pins_itself_and_torch(client):
    assert (ROOT / HERE / f"test_{client.name}.py").exists()
    assert {"torch", client.package} <= {line.partition("==")[0] for line in requirements(client)}


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_all_that_an_environment_is_made_of_agrees_and_what_it_leaves_open_is_as_in_our_own_tests(client):
    pins = run.constraints(client).splitlines()
    versions = {}
    for pin in pins:
        name, _, version = pin.partition("==")
        assert versions.setdefault(name.lower(), version) == version
    assert "pytest" in versions


def result(name, **values):
    return Result(next(client for client in CLIENTS if client.name == name), **values)


def test_a_client_that_is_left_out_is_named_with_the_reason_and_is_not_red(monkeypatch, capsys):
    results = {
        "transformers": result("transformers", version="5", seconds=40, passed=11),
        "torchvision": result("torchvision", left_out="installing took more than 180 s"),
    }
    monkeypatch.setattr(run, "run", lambda client, limit: results[client.name])
    assert run.main(["transformers", "torchvision"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "transformers  5        40 s          11      0" in lines
    assert lines[-1] == "Left out: torchvision, since installing took more than 180 s."


def test_a_test_that_fails_is_red(monkeypatch, capsys):
    monkeypatch.setattr(run, "run", lambda client, limit: result(client.name, version="5", passed=10, wrong=1))
    assert run.main(["transformers"]) == 1
    assert capsys.readouterr().out.split()[-2:] == ["10", "1"]
