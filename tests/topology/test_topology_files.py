import json
from pathlib import Path

import networkx as nx
import pytest

from p2pfl.errors import TopologyError
from p2pfl.topology import describe, load, transports_over, weighted

SHIPPED = Path(__file__).parents[2] / "topologies"


def written(tmp_path, text, name="net.yaml"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


APART = "topology net is not connected: nothing from a can reach u; add an edge on the way between them"


def findings(path):
    with pytest.raises(TopologyError) as caught:
        load(path)
    assert caught.value.place == str(path)
    return list(caught.value.findings)


def named_edges(graph):
    return {tuple(sorted((graph.label(i), graph.label(j)))) for i, j in zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)}


def test_four_hospitals_are_a_ring():
    graph = load(SHIPPED / "four-hospitals.yaml")

    assert graph.name == "four-hospitals"
    assert graph.names == ("cleveland", "hungary", "switzerland", "va")
    assert named_edges(graph) == {("cleveland", "hungary"), ("hungary", "switzerland"), ("switzerland", "va"), ("cleveland", "va")}
    assert weighted(graph).weights.tolist() == [1 / 3] * 8


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_file_loads_mixes_and_says_what_it_is(path):
    lines = path.read_text(encoding="utf-8").splitlines()

    assert lines[0].startswith("# ")
    assert lines[0].endswith(".")
    assert any(line.startswith("# Real: ") for line in lines)
    assert describe(weighted(load(path)))["spectral_gap"] > 0.01


def test_the_backbone_has_a_delay_on_every_link():
    graph = load(SHIPPED / "european-backbone.yaml")
    delays = {(graph.label(i), graph.label(j)): ms for i, j, ms in zip(graph.senders, graph.receivers, graph.latency_ms, strict=True)}

    assert delays["london", "paris"] == delays["paris", "london"] == 2.4  # 344 km
    assert graph.bandwidth_mbps is None


def test_yaml_with_every_value(tmp_path):
    text = """
        nodes: [rome, oslo, lyon]
        edges:
          - {between: [rome, lyon], weight: 0.25, latency_ms: 1e1, bandwidth_mbps: 1000}
          - {between: [oslo, rome], weight: 0.5, latency_ms: 20, bandwidth_mbps: 100}
    """
    graph = load(written(tmp_path, text))

    assert graph.names == ("lyon", "oslo", "rome")
    assert graph.senders.tolist() == [2, 2, 0, 1]
    assert graph.weights.tolist() == [0.25, 0.5, 0.25, 0.5]
    assert graph.latency_ms.tolist() == [10, 20, 10, 20]
    assert graph.bandwidth_mbps.tolist() == [1000, 100, 1000, 100]
    assert weighted(graph, "given") is graph


def test_yaml_with_a_number_of_nodes(tmp_path):
    graph = load(
        written(tmp_path, "nodes: 12\nedges: [[0, 1], [1, 2], [2, 3], [3, 4], [4, 5], [5, 6], [6, 7], [7, 8], [8, 9], [9, 10], [10, 11]]")
    )

    assert graph.names is None
    assert graph.num_nodes == 12
    assert graph.neighbours(2).tolist() == [1, 3]  # 10 and 11 stay behind 9


def test_other_numbers_are_names(tmp_path):
    assert load(written(tmp_path, "nodes: [7, 10, 9]\nedges: [[7, 10], [10, 9]]")).names == ("10", "7", "9")


def test_directed_yaml(tmp_path):
    graph = load(written(tmp_path, "directed: true\nnodes: [a, b, c]\nedges: [[a, b], [b, c], [c, a]]"))

    assert graph.directed
    assert graph.neighbours(0).tolist() == [2]


def test_all_faults_of_a_yaml_file_at_once(tmp_path):
    text = """
        nodes: [oslo, no, rome, oslo]
        links: []
        edges:
          - [oslo, rome]
          - [oslo, oslo]
          - [rome, oslo]
          - [rome, bern]
          - [rome]
          - {between: [rome, oslo], wieght: 3}
          - {latency_ms: 3}
    """

    assert findings(written(tmp_path, text)) == [
        "links = []: unknown key, one of nodes, edges, directed",
        "edges[4] = ['rome']: expected two nodes, [a, b] or {between: [a, b], ...}",
        "edges[5].wieght = 3: unknown key, did you mean weight? one of between, weight, latency_ms, bandwidth_mbps, transport",
        "edges[6] = {'latency_ms': 3}: expected two nodes, [a, b] or {between: [a, b], ...}",
        "nodes[1] = false: expected a text; put it in quotes",
        "nodes: 'oslo' is there 2 times",
        "edges[1]: oslo - oslo leads from a node to itself; leave it out, a node's own weight is what is left",
        "edges[2]: rome - oslo is there already, at edges[0]; keep one of them",
        "edges[3]: 'bern' is not a node; the nodes are oslo, rome",
        "edges[5]: rome - oslo is there already, at edges[0]; keep one of them",
    ]


def test_wrong_values_of_edges(tmp_path):
    text = """
        nodes: [a, b, c, d]
        edges:
          - {between: [a, b], weight: 0, latency_ms: -1, bandwidth_mbps: 0}
          - {between: [b, c], weight: .nan, latency_ms: fast, bandwidth_mbps: 1}
          - {between: [c, d], weight: 0.1, bandwidth_mbps: true}
    """

    assert findings(written(tmp_path, text)) == [
        "edges[0]: weight = 0, expected a number other than 0",
        "edges[1]: weight = nan, expected a number other than 0",
        "edges[2]: no latency_ms, but edges[0] has one; give it for all edges or for none",
        "edges[0]: latency_ms = -1, expected a number from 0 to 1e9",
        "edges[1]: latency_ms = 'fast', expected a number from 0 to 1e9",
        "edges[0]: bandwidth_mbps = 0, expected a number > 0",
        "edges[2]: bandwidth_mbps = true, expected a number > 0",
    ]


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("nodes: many\nedges: []", "nodes = 'many': expected a list of names or how many there are, at most 1000000"),
        ("nodes: 1\nedges: []", "nodes: 1 of them, a network needs at least 2"),
        ("nodes: 3", "edges is missing: expected a list of [a, b] or {between: [a, b], ...}"),
        ("nodes: 2\nedges: [[0, 1]]\ndirected: 1", "directed = 1: expected true or false"),
        ("nodes: -3\nedges: []", "nodes = -3: expected a list of names or how many there are, at most 1000000"),
        ("- a", "holds ['a']: expected a mapping (key: value)"),
        ("nodes: [a, b]\nnodes: [c]", "line 2, column 1: the key 'nodes' is given twice"),
        (
            "nodes: [a, b, c, d]\nedges: [[a, b], [c, d]]",
            "topology net is not connected: nothing from a can reach c; add an edge on the way between them",
        ),
        (
            "directed: true\nnodes: [a, b]\nedges: [[b, a]]",
            "topology net is not connected: nothing from a can reach b; add an edge on the way between them",
        ),
    ],
)
def test_one_fault_of_a_yaml_file(tmp_path, text, finding):
    assert findings(written(tmp_path, text)) == [finding]


@pytest.fixture
def triangle():
    graph = nx.Graph()
    graph.add_edge("rome", "lyon", weight=0.25, latency_ms=10.0, color="red")
    graph.add_edge("oslo", "rome", weight=0.5, latency_ms=20.0)
    graph.add_edge("oslo", "lyon", weight=0.125, latency_ms=30.0)
    return graph


def write_json(graph, path):
    path.write_text(json.dumps(nx.node_link_data(graph, edges="edges")), encoding="utf-8")


def write_old_json(graph, path):
    path.write_text(json.dumps(nx.node_link_data(graph, edges="links")), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("net.graphml", nx.write_graphml),
        ("net.gml", nx.write_gml),
        ("net.edgelist", nx.write_edgelist),
        ("net.json", write_json),
        ("net.json", write_old_json),
    ],
)
def test_what_networkx_writes_comes_back(tmp_path, triangle, name, write):
    for values in triangle.edges.values():
        values.pop("color", None)  # GraphML and edge lists of networkx want the same attributes on every edge
    write(triangle, tmp_path / name)
    graph = load(tmp_path / name)

    assert graph.names == ("lyon", "oslo", "rome")
    assert graph.senders.tolist() == [1, 2, 0, 2, 0, 1]
    assert graph.weights.tolist() == [0.125, 0.25, 0.125, 0.5, 0.25, 0.5]
    assert graph.latency_ms.tolist() == [30, 10, 30, 20, 10, 20]


@pytest.mark.parametrize(("name", "write"), [("net.graphml", nx.write_graphml), ("net.gml", nx.write_gml), ("net.json", write_json)])
def test_directions_come_back(tmp_path, name, write):
    write(nx.relabel_nodes(nx.cycle_graph(3, create_using=nx.DiGraph), {0: "a", 1: "b", 2: "c"}), tmp_path / name)
    graph = load(tmp_path / name)

    assert graph.directed
    assert graph.neighbours(0).tolist() == [2]


@pytest.mark.parametrize("name", ["net.graphml", "net.gml", "net.edges"])
def test_numbered_nodes_keep_their_numbers(tmp_path, name):
    {"net.graphml": nx.write_graphml, "net.gml": nx.write_gml, "net.edges": nx.write_edgelist}[name](nx.path_graph(12), tmp_path / name)
    graph = load(tmp_path / name)

    assert graph.names is None
    assert graph.neighbours(10).tolist() == [9, 11]


@pytest.mark.parametrize(("text", "weights"), [("# two links\na b\nb c\n", None), ("a b 0.25\nb c 0.5\n", [0.25, 0.25, 0.5, 0.5])])
def test_edge_lists_as_people_write_them(tmp_path, text, weights):
    graph = load(written(tmp_path, text, "net.txt"))

    assert graph.names == ("a", "b", "c")
    assert (graph.weights.tolist() if graph.weights is not None else None) == weights


def test_gml_without_labels_is_known_by_its_ids(tmp_path):
    text = "graph [ node [ id 0 ] node [ id 1 ] edge [ source 0 target 1 ] ]"

    assert load(written(tmp_path, text, "net.gml")).num_nodes == 2


@pytest.mark.parametrize(
    ("name", "text", "finding"),
    [
        ("net.edges", "a b\nb a\n", "line 2: b - a is there already, at line 1; keep one of them"),
        ("net.edges", "a b\nb b\n", "line 2: b - b leads from a node to itself; leave it out, a node's own weight is what is left"),
        (
            "net.edges",
            "a b\nc d\n",
            f"{APART.replace('reach u', 'reach c')}; line 1, 'a b', may be a header: leave it out then",
        ),
        ("net.json", "[]", 'expected node-link JSON: {"nodes": [{"id": ...}], "edges": [{"source": ..., "target": ...}]}'),
        (
            "net.json",
            '{"nodes": [{"id": "a"}, {"id": "b"}], "edges": [{"source": "a", "target": "c"}]}',
            "edges[0]: 'c' is not a node; the nodes are a, b",
        ),
        ("net.csv", "a,b", "a file ending in '.csv': expected one of .yaml, .yml, .graphml, .gml, .json, .edgelist, .edges, .txt"),
    ],
)
def test_faults_of_other_files(tmp_path, name, text, finding):
    assert findings(written(tmp_path, text, name)) == [finding]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("net.graphml", "<graphml"),
        ("net.graphml", "<html/>"),
        ("net.gml", "graph ["),
        ("net.gml", "nothing"),
        ("net.json", "{"),
        ("net.json", '{"nodes": [{"name": "a"}]}'),
        ("net.json", '{"nodes": ["a"]}'),
        ("net.json", '{"nodes": [], "edges": 3}'),
        ("net.json", '{"nodes": [{"id": ["a"]}, {"id": "b"}], "edges": []}'),
        ("net.edges", "a b c d\n"),
        ("net.edges", ""),
        ("net.edges", "a b {'weight': \n"),
        ("net.yaml", "nodes: ["),
        ("net.yaml", "nodes: 2\nedges: [[0, [1]]]"),
    ],
)
def test_what_cannot_be_read_is_a_topology_error_with_the_file(tmp_path, name, text):
    path = written(tmp_path, text, name)

    assert findings(path)


def test_bytes_that_are_no_text(tmp_path):
    for name in ("net.yaml", "net.gml", "net.json", "net.edges", "net.graphml"):
        (tmp_path / name).write_bytes(b"\xff\xfe\x00")

        assert findings(tmp_path / name)


def test_a_missing_file(tmp_path):
    assert findings(tmp_path / "none.yaml") == ["no such file"]


def test_the_transports_that_edges_name_go_by_the_names_of_the_run(tmp_path):
    named = written(
        tmp_path,
        """
        nodes: [va, basel, rome]
        edges: [{between: [va, basel], transport: relay}, [basel, rome], {between: [rome, va], transport: zeromq}]
        """,
    )

    assert transports_over(named, ["basel", "rome", "va"]) == {("basel", "va"): "relay", ("rome", "va"): "zeromq"}

    numbered = written(tmp_path, "nodes: 3\nedges: [{between: [0, 2], transport: relay}, [1, 2]]")

    assert transports_over(numbered, ["a-0", "a-1", "a-2"]) == {("a-0", "a-2"): "relay"}
    with pytest.raises(TopologyError, match=r"edges\[0\]\.transport = 3: expected the name of a transport, such as relay"):
        load(written(tmp_path, "nodes: 2\nedges: [{between: [0, 1], transport: 3}]"))
