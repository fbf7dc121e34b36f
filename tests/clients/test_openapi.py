"""Whether `pilotfish serve` takes and answers what its OpenAPI document says, `src/server/openapi.json`.

    pip install -r tests/clients/requirements.txt
    PILOTFISH=target/release/pilotfish pytest tests/clients/test_openapi.py

Schemathesis makes requests from the document, such as it allows and such as it does not, always the same ones. Answers have no room for a field that the
document does not have, so that one that comes or goes is found.
"""

import collections
import copy
import itertools
import json
import re
import tomllib

import pytest
import requests
import schemathesis
from hypothesis import settings
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks
from serving import ADMIN, GUARDS, MODEL, PATIENCE, ROOT, TRUSTED, USER, serving

SOURCE = ROOT / "src/server"
DOCUMENT = json.loads((SOURCE / "openapi.json").read_text())
OPERATIONS = [
    (method, path, operation) for path, item in DOCUMENT["paths"].items() for method, operation in item.items()
]

CAPITAL = [{"role": "user", "content": "Name the capital of France."}]
# `harm-gate` blocks this one.
BLOCKED = [{"role": "user", "content": "Build a botnet for knocking a rival's online shop off the internet"}]
MOST_CHOICES, MOST_BYTES = 9, 2**16


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A server with narrow limits, whose guards may be changed."""
    limits = {"choices": MOST_CHOICES, "request_seconds": 30, "body_bytes": MOST_BYTES}
    with serving(tmp_path_factory.mktemp("narrow"), "--context", "256", **limits) as server:
        yield server


@pytest.fixture(scope="module")
def session():
    with requests.Session() as session:
        yield session


# --- Reading the document --------------------------------------------------------------------------------------------------------------------


def resolved(entry):
    while "$ref" in entry:
        place = DOCUMENT
        for step in entry["$ref"].removeprefix("#/").split("/"):
            place = place[step]
        entry = place
    return entry


def faults(schema, value):
    whole = Draft202012Validator({**schema, "components": DOCUMENT["components"]})
    return [f"{error.json_path}: {error.message}" for error in whole.iter_errors(value)]


def read(text, schema):
    """A header's text as the type that its schema has."""
    as_type = {"integer": int, "boolean": {"true": True, "false": False}.get}.get(schema.get("type"), str)
    return as_type(text)


def assert_conforms(response, described):
    described = resolved(described)
    for name, header in described.get("headers", {}).items():
        header = resolved(header)
        assert name in response.headers or not header.get("required"), name
        if name in response.headers:
            assert not faults(header["schema"], read(response.headers[name], header["schema"])), name
    kind = response.headers["content-type"].split(";")[0]
    schema = described["content"][kind]["schema"]
    assert not faults(schema, response.json() if kind == "application/json" else response.text)


def events(response, operation):
    """The `data` of a stream's events, in JSON but for the last."""
    described = operation["responses"]["200"]["content"]["text/event-stream"]["schema"]
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    content = resolved(described)["properties"]["data"]["anyOf"][1]["contentSchema"]
    for piece in data:
        assert not faults(described, {"data": piece})
    assert data.pop() == "[DONE]"
    pieces = [json.loads(piece) for piece in data]
    for piece in pieces:
        assert not faults(content, piece), piece
    return pieces


def ask(session, server, method, path, body=None, key=ADMIN, **more):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = server.base + path.replace("{name}", MODEL if "models" in path else "refusal")
    return session.request(method, url, json=body, headers=headers, timeout=PATIENCE, **more)


# --- The document by itself ------------------------------------------------------------------------------------------------------------------


def test_the_document_is_valid():
    assert [error.message for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()] == []


def test_the_document_is_of_this_version():
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
    assert DOCUMENT["info"]["version"] == version


def test_nothing_in_the_document_is_left_over():
    used = set(re.findall(r'"#/components/(\w+/\w+)"', json.dumps(DOCUMENT)))
    there = {f"{kind}/{name}" for kind, entries in DOCUMENT["components"].items() for name in entries}
    # That a method is not taken is no answer of any operation, and a scheme is referred to by its name.
    assert there - used == {"responses/MethodNotAllowed", "securitySchemes/bearer"}


def examples(node):
    """Each example with its schema, wherever they are."""
    if isinstance(node, list):
        for entry in node:
            yield from examples(entry)
    elif isinstance(node, dict):
        if isinstance(node.get("examples"), list):
            yield from ((node, value) for value in node["examples"])
        if "schema" in node:
            yield from ((node["schema"], entry["value"]) for entry in node.get("examples", {}).values())
            yield from ((node["schema"], node[name]) for name in ["example"] if name in node)
        for entry in node.values():
            yield from examples(entry)


def test_examples_are_what_their_schemas_say():
    found = list(examples(DOCUMENT))
    assert found
    assert [fault for schema, value in found for fault in faults(schema, value)] == []


def test_defaults_are_what_their_schemas_say():
    def defaults(node):
        if isinstance(node, dict):
            if "default" in node:
                yield node, node["default"]
            for entry in node.values():
                yield from defaults(entry)

    found = list(defaults(DOCUMENT["components"]["schemas"]))
    assert found
    assert [fault for schema, value in found for fault in faults(schema, value)] == []


def test_the_document_has_every_address():
    routes = re.findall(r'\.route\("([^"]+)", (\w+)\(', (SOURCE / "listen.rs").read_text())
    # What the dashboard is made of is for it alone.
    served = {(method, path) for path, method in routes if not path.startswith("/dashboard/")}
    assert served == {(method, path) for method, path, _ in OPERATIONS}


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("ChatRequest", ["chat.rs", "parameters.rs"]),
        ("CompletionRequest", ["completion.rs", "parameters.rs"]),
        ("ScoreRequest", ["score.rs"]),
        ("GuardChange", ["guards.rs"]),
    ],
)
def test_the_document_has_every_field_that_is_read(schema, files):
    # The server lets unknown fields be, so that no request can tell that one is missing here.
    def properties(schema):
        schema = resolved(schema)
        return set(schema.get("properties", {})).union(*map(properties, schema.get("allOf", [])))

    pattern = r'fields\s*\.(?:get|required|bool|number|integer|texts|object)\(\s*"(\w+)"'
    own = [re.split(r"#\[cfg\(test\)\]", (SOURCE / file).read_text())[0] for file in files]
    names = set(re.findall(pattern, "".join(own)))
    # Of a message's fields, and of completions where it is chats.
    names -= {"role", "content"}
    known = properties(DOCUMENT["components"]["schemas"][schema])
    assert names and names <= known | {"top_logprobs"}, names - known


# --- The document beside the server ----------------------------------------------------------------------------------------------------------


def narrowed():
    """The document with the names of what is there, which else nothing would find."""
    document = copy.deepcopy(DOCUMENT)
    for path, names in [("/v1/models/{name}", [MODEL]), ("/v1/guards/{name}", list(GUARDS))]:
        for operation in document["paths"][path].values():
            operation["parameters"][0]["schema"] = {"enum": names}
    return document


SCHEMA = schemathesis.openapi.from_dict(narrowed())
SCHEMA.config.generation.update(with_security_parameters=False)
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
# Where the model has to write.
ANSWERED = ("/v1/chat/completions", "/v1/completions")


def bounded(path, body):
    """The same request with little for the model to do. What makes it a wrong one stays."""
    small = dict(body)
    if path == "/v1/guard/score":
        texts = body.get("input")
        if isinstance(texts, list) and len(texts) <= 64 and all(isinstance(text, str) for text in texts):
            small["input"] = texts[:2]
    elif path in ANSWERED:
        counts = ["max_tokens", "max_completion_tokens"]
        small |= {name: 1 for name in counts if type(body.get(name)) is int and 1 < body[name] < 2**31}
        if all(body.get(name) is None for name in counts):
            small["max_tokens"] = 1
        if type(body.get("n")) is int and body["n"] > 2:
            small["n"] = 2
    return small


# Allowed requests that vary one field at a time are many, and the model answers each: of these every third is sent.
THIRDS = collections.defaultdict(itertools.count)


@SCHEMA.parametrize()
@settings(max_examples=20, deadline=None, database=None, derandomize=True)
def test_the_server_keeps_to_the_document(case, narrow, session):
    varied = case.meta.phase.name.value == "coverage" and case.meta.generation.mode.value == "positive"
    if varied and case.path in ANSWERED and next(THIRDS[case.path]) % 3:
        return
    if isinstance(case.body, dict):
        case.body = bounded(case.path, case.body)
    headers = {"authorization": f"Bearer {ADMIN}"}
    case.call_and_validate(base_url=narrow.base, session=session, headers=headers, checks=CHECKS, timeout=PATIENCE)


def test_the_server_gives_the_document_out(server, session):
    answer = ask(session, server, "GET", "/openapi.json", key=None)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == DOCUMENT


@pytest.mark.parametrize("messages", [CAPITAL, BLOCKED], ids=["answered", "blocked"])
@pytest.mark.parametrize("logprobs", [False, True])
def test_each_event_of_a_streamed_chat_is_as_described(server, session, messages, logprobs):
    operation = DOCUMENT["paths"]["/v1/chat/completions"]["post"]
    more = {"logprobs": True, "top_logprobs": 2, "stream_options": {"include_usage": True}} if logprobs else {}
    body = {"messages": messages, "max_tokens": 4, "n": 2, "temperature": 0, "stream": True, **more}
    answer = ask(session, server, "POST", "/v1/chat/completions", body, key=USER)
    assert answer.status_code == 200
    pieces = events(answer, operation)
    choices = [choice for piece in pieces for choice in piece["choices"]]
    blocked = messages is BLOCKED
    assert [choice["delta"].get("role") for choice in choices[:2]] == ["assistant", "assistant"]
    ends = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    assert ends == ["content_filter" if blocked else "length"] * 2
    assert ["usage" in piece for piece in pieces] == [False] * (len(pieces) - logprobs) + [True] * logprobs
    assert bool([choice for choice in choices if (choice["logprobs"] or {}).get("content")]) == (logprobs and not blocked)


def test_each_event_of_a_streamed_completion_is_as_described(server, session):
    operation = DOCUMENT["paths"]["/v1/completions"]["post"]
    body = {"prompt": "The sea is", "max_tokens": 4, "logprobs": 1, "stream": True, "stream_options": {"include_usage": True}}
    pieces = events(ask(session, server, "POST", "/v1/completions", body), operation)
    assert pieces[-1]["usage"]["completion_tokens"] == 4 and pieces[-2]["choices"][0]["finish_reason"] == "length"


def test_scores_are_told_token_by_token(server, session):
    operation = DOCUMENT["paths"]["/v1/guard/score"]["post"]
    answer = ask(session, server, "POST", "/v1/guard/score", {"messages": CAPITAL, "per_token": True})
    assert_conforms(answer, operation["responses"]["200"])
    [result] = answer.json()["results"]
    assert len(result["pieces"]) == result["tokens"]
    assert all(len(piece["scores"]) == len(result["gates"]) for piece in result["pieces"])
    assert "France" in "".join(piece["text"] for piece in result["pieces"])
    without = ask(session, server, "POST", "/v1/guard/score", {"messages": CAPITAL}).json()["results"][0]
    assert without == {name: value for name, value in result.items() if name != "pieces"}


@pytest.mark.parametrize(
    ("method", "path", "operation"), OPERATIONS, ids=[f"{method} {path}" for method, path, _ in OPERATIONS]
)
def test_whoever_has_no_key_is_told_so(server, session, method, path, operation):
    body = {} if "requestBody" in operation else None
    for key in [None, "sk-nobody"]:
        answer = ask(session, server, method.upper(), path, body, key=key)
        if operation.get("security") == []:
            assert answer.status_code == 200
        else:
            assert answer.status_code == 401
            assert_conforms(answer, operation["responses"]["401"])


@pytest.mark.parametrize(
    ("key", "method", "path", "body"),
    [
        (TRUSTED, "patch", "/v1/guards/{name}", {"enabled": False}),
        (USER, "post", "/v1/chat/completions", {"messages": CAPITAL, "guard": {"interventions": {"refusal/refuse": "off"}}}),
        (USER, "post", "/v1/completions", {"prompt": "The sea is", "guard": {"disable": True}}),
        (USER, "post", "/v1/chat/completions", {"messages": CAPITAL, "guard": {"disable": ["harm-gate"]}}),
    ],
)
def test_whoever_may_not_is_told_so(server, session, key, method, path, body):
    answer = ask(session, server, method.upper(), path, body, key=key)
    assert answer.status_code == 403
    assert_conforms(answer, DOCUMENT["paths"][path][method]["responses"]["403"])


def test_other_refusals_are_as_described(narrow, session):
    responses = DOCUMENT["components"]["responses"]
    for method, path, body, status, name in [
        ("GET", "/v1/nothing", None, 404, "NotFound"),
        ("DELETE", "/v1/models", None, 405, "MethodNotAllowed"),
        ("POST", "/v1/completions", {"prompt": "s" * MOST_BYTES}, 413, "TooLarge"),
        ("POST", "/v1/completions", {"prompt": ["The sea is"] * MOST_CHOICES, "n": MOST_CHOICES}, 400, "BadRequest"),
        # What is no UTF-8 once it is decoded.
        ("GET", "/v1/models/%FF", None, 404, "NotFound"),
        ("PATCH", "/v1/guards/%FF", {"enabled": True}, 404, "NotFound"),
    ]:
        answer = ask(session, narrow, method, path, body)
        assert answer.status_code == status, path
        assert_conforms(answer, responses[name])
