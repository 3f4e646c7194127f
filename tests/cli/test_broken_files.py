"""Files as people get them wrong: exit code 2, every finding in one go, never a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from p2pfl import cli

pytestmark = pytest.mark.no_cover  # what other tests cover, many times over: being traced would take a third longer

TASK = "task: {name: quadratic}\n"
MILLIONS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
OF_EVERY_KEY = {
    "name": "expected a text",
    "task": "expected a mapping (key: value)",
    "nodes": "expected a whole number",
    "partition": "expected a mapping (key: value)",
    "topology": "expected a mapping (key: value)",
    "weights": "expected a text",
    "weighting": "one of 'uniform' or 'samples'",
    "algorithm": "expected a mapping (key: value)",
    "optimizer": "expected a mapping (key: value)",
    "aggregator": "expected a mapping (key: value)",
    "compressor": "expected a mapping (key: value)",
    "privacy": "expected null; there is no privacy mechanism to choose yet",
    "rounds": "expected a whole number",
    "stop": "expected a mapping (key: value)",
    "dtype": "one of 'float32' or 'float64'",
    "validation": "expected a number",
    "evaluate_every": "expected a whole number",
    "checkpoint_every": "expected a whole number",
    "save_models_every": "expected a whole number",
    "seed": "expected a whole number",
}
FOLDER_NAME = (
    "it names the run's folder: expected 1 to 100 characters without / and \\ and control characters, not starting with '.', "
    "no space at an end"
)
MAPPING = "expected a mapping (key: value)"
NODES = "expected a list of names or how many there are, at most 1000000"
EDGES = "expected a list of [a, b] or {between: [a, b], ...}"

EXPERIMENTS = {
    "an empty file": ("", [f"is empty: {MAPPING}, such as task: {{name: breast-cancer}}"]),
    "only a comment": ("# later\n---\n", [f"is empty: {MAPPING}, such as task: {{name: breast-cancer}}"]),
    "null": ("null\n", [f"holds null: {MAPPING}"]),
    "a private key": ("-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQ\n", [f"holds a text: {MAPPING}"]),
    "bytes that are not UTF-8": (
        TASK.encode() + b"name: \xe9\n",
        ["cannot be read: line 2 holds the byte 0xe9, which is not UTF-8; save it as UTF-8"],
    ),
    "two documents": (
        TASK + "---\n" + TASK,
        ["line 2, column 1: expected a single document in the stream, but found another document"],
    ),
    "a tab": (
        TASK + "optimizer:\n\tlr: 1\n",
        ["line 3, column 1: found character '\\t' that cannot start any token; indent with spaces"],
    ),
    "lists and mappings as keys": (
        TASK + "? [a]\n: 1\n{b: 1}: 2\n",
        ["line 2, column 3: a list as a key: expected a text", "line 4, column 1: a mapping as a key: expected a text"],
    ),
    "keys given twice": (
        TASK + TASK + "stop: {patience: 1, patience: 2}\n",
        ["line 2, column 1: the key 'task' is given twice", "line 3, column 21: the key 'patience' is given twice"],
    ),
    "a billion laughs": (MILLIONS, ["line 4, column 36: aliases stand for more than 10000 values"]),
    "an alias of itself": ("a: &a [*a]\n", ["line 1, column 8: an alias inside of what it stands for"]),
    "deep nesting": ("a: " + "[" * 60 + "]" * 60, ["line 1, column 13: nested more than 50 deep"]),
    "very deep nesting": ("a: " + "[" * 20_000, ["not readable as YAML: nested more than 50 deep"]),
    "a number without digits": (TASK + "rounds: !!int ''\n", ["line 2, column 9: '' is no int"]),
    "a number without end": (TASK + f"rounds: {'9' * 5000}\n", [f"line 2, column 9: '{'9' * 58}… is no int"]),
    "a number too large for a float": (
        TASK + f"optimizer: {{lr: {'9' * 400}}}\n",
        ["optimizer.lr = a whole number of more than 60 digits: expected a number"],
    ),
    "no task": ("rounds: 3\n", ["task: required, but missing"]),
    "null for a task": ("task: null\n", [f"task = null: {MAPPING}"]),
    "lists for everything": (
        "".join(f"{key}: []\n" for key in OF_EVERY_KEY),
        [f"{key} = []: {what}" for key, what in OF_EVERY_KEY.items()],
    ),
    "truth for numbers": (
        TASK + "nodes: true\nrounds: true\nseed: false\nvalidation: true\nalgorithm: {local_steps: true}\noptimizer: {lr: true}\n",
        [
            "nodes = true: expected a whole number",
            "algorithm.local_steps = true: expected a whole number",
            "optimizer.lr = true: expected a number",
            "rounds = true: expected a whole number",
            "validation = true: expected a number",
            "seed = false: expected a whole number",
        ],
    ),
    "fractions and texts for whole numbers": (
        TASK + "nodes: 3.0\nrounds: 1e3\nseed: '7'\nstop: {patience: 1.5}\n",
        [
            "nodes = 3.0: expected a whole number",
            "rounds = 1000.0: expected a whole number",
            "stop.patience = 1.5: expected a whole number",
            "seed = '7': expected a whole number",
        ],
    ),
    "numbers that are not finite": (
        TASK + "validation: .nan\noptimizer: {lr: .inf, momentum: .nan, weight_decay: -.inf, clip_norm: .inf}\n",
        [
            "optimizer.lr = inf: expected a finite number",
            "optimizer.momentum = nan: expected a finite number",
            "optimizer.weight_decay = -inf: expected a finite number",
            "optimizer.clip_norm = inf: expected a finite number",
            "validation = nan: expected a finite number",
        ],
    ),
    "numbers out of all proportion": (
        TASK
        + "nodes: 1000000000\nrounds: 1000000000000\nvalidation: 0.999\nalgorithm: {local_steps: 10000000}\nstop: {settle: 10000000}\n",
        [
            "nodes = 1000000000: must be <= 10000000",
            "algorithm.local_steps = 10000000: must be <= 1000000",
            "rounds = 1000000000000: must be <= 1000000",
            "stop.settle = 10000000: must be <= 1000000",
            "validation = 0.999: must be <= 0.9",
        ],
    ),
    "a warm-up longer than the run": (
        TASK + "rounds: 5\noptimizer: {warmup_rounds: 5}\n",
        ["optimizer.warmup_rounds = 5: must be < rounds, which is 5"],
    ),
    "the folder above as a name": (TASK + "name: '..'\n", [f"name = '..': {FOLDER_NAME}"]),
    "no letter as a name": (TASK + "name: ''\n", [f"name = '': {FOLDER_NAME}"]),
    "a path as a name": (TASK + "name: a/b\n", [f"name = 'a/b': {FOLDER_NAME}"]),
    "null as a name": (TASK + "name: null\n", ["name = null: expected a text"]),
    "numbers as keys": (
        "1: 2\n" + TASK,
        ["the key 1: expected a text"],
    ),
    "numbers as keys of sections": (
        "task: {name: quadratic, 1: 2}\nalgorithm: {null: 1}\noptimizer: {true: 1}\n",
        ["task: the key 1: expected a text", "algorithm: the key null: expected a text", "optimizer: the key true: expected a text"],
    ),
    "only one can be meant": (
        TASK + "aggregator: {name: maen}\ncompressor: {name: none, k: 2}\n",
        ["aggregator.name = 'maen': expected mean", "compressor.k = 2: unknown key, expected name"],
    ),
    "a privacy that is not there": (
        TASK + "privacy: {sigma: 1}\n",
        ["privacy = {'sigma': 1}: expected null; there is no privacy mechanism to choose yet"],
    ),
    "an empty topology": (TASK + "topology: {}\n", ["topology = {}: expected a name (see `p2pfl topology list`) or a file"]),
    "a topology of name and file": (
        TASK + "topology: {name: ring, file: /x.yaml}\n",
        ["topology = {'name': 'ring', 'file': '/x.yaml'}: has a name and a file; keep one of them"],
    ),
    "a topology's file with options": (
        TASK + "topology: {file: 3, degree: 2}\n",
        ["topology.degree = 2: unknown key, one of name, file", "topology.file = 3: expected a path"],
    ),
    "a topology's file that is called file": (
        TASK + "topology: {name: file}\n",
        ["topology = {'name': 'file'}: expected a name (see `p2pfl topology list`) or a file"],
    ),
    "options of a topology": (
        TASK + "rounds: -1\ntopology: {name: random-regular, degre: 3, degree: true, seed: [1]}\n",
        [
            "rounds = -1: must be >= 0",
            "topology random-regular has no option degre = 3: expected degree",
            "topology random-regular with degree = true: expected a whole number",
            "topology random-regular with seed = [1]: expected a whole number",
        ],
    ),
    "options of a task": (
        "task: {name: digits, hiden: 3}\nrounds: -1\n",
        ["rounds = -1: must be >= 0", "task.hiden = 3: did you mean hidden? digits takes hidden, test_share"],
    ),
    "options of a partition": (
        TASK + "partition: {name: dirichlet, alhpa: 3}\n",
        ["partition.alhpa = 3: unknown key, did you mean alpha? one of name, alpha"],
    ),
    "options of an algorithm": (
        TASK + "algorithm: {options: {a: 1}}\n",
        ["algorithm.options = {'a': 1}: unknown key, one of name, local_steps, batch_size"],
    ),
}

TOPOLOGIES = {
    "an empty file": ("", [f"is empty: {MAPPING}, such as nodes: [a, b] and edges: [[a, b]]"]),
    "nothing in it": ("nodes: null\n", [f"nodes = null: {NODES}", f"edges is missing: {EDGES}"]),
    "wrong types": (
        "nodes: true\nedges: 3\ndirected: 1\n",
        [f"nodes = true: {NODES}", f"edges = 3: {EDGES}", "directed = 1: expected true or false"],
    ),
    "a thousand million nodes": ("nodes: 1000000000\nedges: []\n", [f"nodes = 1000000000: {NODES}"]),
    "a misspelt key": (
        "node: 2\nedges: [[0, 1]]\n",
        ["node = 2: unknown key, did you mean nodes? one of nodes, edges, directed", f"nodes is missing: {NODES}"],
    ),
    "a list as a key": ("nodes: 2\nedges: [{[a]: 1}]\n", ["line 2, column 10: a list as a key: expected a text"]),
    "a number as a key": (
        "nodes: 2\nedges: [{1: 2, between: [0, 1]}]\n",
        ["edges[0].1 = 2: unknown key, one of between, weight, latency_ms, bandwidth_mbps, transport"],
    ),
    "a weight too large for a float": (
        f"nodes: 2\nedges: [{{between: [0, 1], weight: {'9' * 400}}}]\n",
        ["edges[0]: weight = a whole number of more than 60 digits, expected a number other than 0"],
    ),
    "strange nodes": (
        "nodes: [1.5, null, a, a]\nedges: [[a, b], null]\n",
        [
            f"edges[1] = null: {EDGES.replace('a list of [a, b]', 'two nodes, [a, b]')}",
            "nodes[0] = 1.5: expected a text; put it in quotes",
            "nodes[1] = null: expected a text; put it in quotes",
            "nodes: 'a' is there 2 times",
            "edges[0]: 'b' is not a node; the nodes are a",
        ],
    ),
    "a billion laughs": (MILLIONS, ["line 4, column 36: aliases stand for more than 10000 values"]),
    "deep nesting": ("nodes: " + "[" * 60 + "]" * 60, ["line 1, column 17: nested more than 50 deep"]),
    "bytes that are not UTF-8": (b"nodes: [\xe9]", ["cannot be read: line 1 holds the byte 0xe9, which is not UTF-8; save it as UTF-8"]),
}


@pytest.fixture
def p2pfl(tmp_path, monkeypatch, capsys):
    """What a command exits with and says on standard error."""
    monkeypatch.chdir(tmp_path)

    def p2pfl(*arguments):
        monkeypatch.setattr(sys, "argv", ["p2pfl", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        assert said.out == ""
        return caught.value.code, said.err

    return p2pfl


def told(place, findings):
    """Standard error for the findings of a file."""
    return f"p2pfl: {place}: {findings[0]}\n" if len(findings) == 1 else "\n  ".join([f"p2pfl: {place}:", *findings]) + "\n"


def write(content):
    Path("file.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(("content", "findings"), EXPERIMENTS.values(), ids=EXPERIMENTS.keys())
def test_a_broken_experiment(p2pfl, content, findings):
    write(content)

    assert p2pfl("simulate", "file.yaml") == (2, told("file.yaml", findings))
    assert [path.name for path in Path().iterdir()] == ["file.yaml"]


@pytest.mark.parametrize(("content", "findings"), TOPOLOGIES.values(), ids=TOPOLOGIES.keys())
def test_a_broken_topology(p2pfl, content, findings):
    write(content)

    assert p2pfl("topology", "show", "file.yaml") == (2, told("file.yaml", findings))


def test_a_folder_and_what_cannot_be_read(p2pfl):
    Path("file.yaml").mkdir()

    assert p2pfl("simulate", "file.yaml") == (2, told("file.yaml", ["cannot be read: it is a folder, expected a file"]))
    assert p2pfl("topology", "show", "file.yaml") == (2, told("file.yaml", ["is a folder: expected a file"]))
    long = "x" * 300 + ".yaml"
    assert p2pfl("simulate", long) == (2, told(long, ["cannot be read: File name too long"]))
    assert p2pfl("topology", "show", long) == (2, told(long, ["cannot be read: File name too long"]))


@pytest.mark.skipif(sys.platform != "linux", reason="a file that even root cannot read")
def test_a_file_that_nobody_can_read(p2pfl):
    Path("file.yaml").symlink_to("/proc/self/mem")

    assert p2pfl("simulate", "file.yaml") == (2, told("file.yaml", ["cannot be read: Input/output error"]))
    assert p2pfl("topology", "show", "file.yaml") == (2, told("file.yaml", ["cannot be read: Input/output error"]))


@pytest.mark.parametrize("file", ["x" * 300 + ".yaml", "a\\0b.yaml", "none.yaml", "."])
def test_a_topologys_file_that_cannot_be(p2pfl, file):
    write(f'{TASK}nodes: 4\ntopology: {{file: "{file}"}}\n')
    code, said = p2pfl("simulate", "file.yaml")

    assert code == 2
    assert "Traceback" not in said


def test_two_unknown_keys_two_misspelt_names_and_a_negative_number_are_five_findings(p2pfl):
    write("task: {name: quadratic}\ncolour: red\nspeed: 3\ntopology: {name: rign}\nalgorithm: {name: dpsdg}\nrounds: -1\n")
    code, said = p2pfl("simulate", "file.yaml")
    place, *findings = said.splitlines()

    assert (code, place) == (2, "p2pfl: file.yaml:")
    assert [finding.split(" = ")[0].strip() for finding in findings] == ["rounds", "colour", "speed", "topology.name", "algorithm.name"]


def test_a_graph_has_at_most_so_many_nodes(p2pfl):
    assert p2pfl("topology", "show", "ring", "-n", "1000000000000") == (
        2,
        "p2pfl: topology ring of 1000000000000 nodes: expected at most 10000000\n",
    )
