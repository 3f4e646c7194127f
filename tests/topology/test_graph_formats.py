"""GML, GraphML and JSON of other programs are read right, or refused; no edge is lost and no node is made up."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import networkx as nx
import pytest

from p2pfl.errors import TopologyError
from p2pfl.topology import load

DOCUMENT = Path(__file__).parents[2] / "docs" / "graph-files.md"
ELEMENT = '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">'
HEAD = f'{ELEMENT}\n<graph edgedefault="undirected">'
TAIL = "</graph></graphml>"
NODES = '<node id="a"/><node id="b"/><node id="c"/>'
PATH = '<edge source="a" target="b"/><edge source="b" target="c"/>'
WEIGHT = '<key id="w" for="edge" attr.name="weight" attr.type="double">'
WEIGHTED = f"{ELEMENT}{WEIGHT}</key><graph edgedefault='undirected'>{NODES}<edge source='b' target='c'><data key='w'>1</data></edge>"
GML_NODES = "node [ id 1 ]\nnode [ id 2 ]\nnode [ id 3 ]\n"
GML_PATH = "edge [ source 1 target 2 ]\nedge [ source 2 target 3 ]\n"


def written(tmp_path, text, name):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def findings(tmp_path, text, name):
    with pytest.raises(TopologyError) as caught:
        load(written(tmp_path, text, name))
    return list(caught.value.findings)


def links(graph):
    return {frozenset((graph.label(i), graph.label(j))) for i, j in zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)}


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        (f"{HEAD}{NODES}{PATH}</graph>\n<graph edgedefault='undirected'/></graphml>", "holds 2 graphs, at lines 2, 3: expected one"),
        (f"{ELEMENT}</graphml>", "holds 0 graphs: expected one"),
        (
            f"{HEAD}\n{NODES}{PATH}\n<edge source='c' target='b'/>{TAIL}",
            "line 4: c - b is there already, at line 3; keep one of them",
        ),
        (
            f"{HEAD}{NODES}\n<edge id='1' source='a' target='b'/>\n<edge id='1' source='a' target='b'/><edge source='b' target='c'/>{TAIL}",
            "line 4: a - b is there already, at line 3; keep one of them",
        ),
        (f"{HEAD}<node id='a'/><node id='c'/>\n<edge source='a' target='b'/>{TAIL}", "line 3: 'b' is not a node; the nodes are a, c"),
        (f"{HEAD}{NODES}<node id='c'/>{PATH}{TAIL}", "nodes: 'c' is there 2 times"),
        (
            f"{HEAD}{NODES}{PATH}<edge source='c' target='d'/>\n<node id='d'><graph><node id='e'/></graph></node>{TAIL}",
            "line 3: a graph inside of node 'd': expected one flat graph",
        ),
        (f"{HEAD}{NODES}{PATH}\n<hyperedge/>{TAIL}", "line 3: a hyperedge: expected edges between two nodes"),
        (
            f"{HEAD}{NODES}<edge source='a' target='b'/>\n<edge source='b' target='c' directed='true'/>{TAIL}",
            "line 3: directed = 'true' in a graph with edgedefault = 'undirected': expected all alike",
        ),
        (
            f"{ELEMENT}\n<graph edgedefault='Directed'>{NODES}{PATH}{TAIL}",
            "line 2: edgedefault = 'Directed': expected directed or undirected",
        ),
        (f"{ELEMENT}\n<graph>{NODES}{PATH}{TAIL}", "line 2: edgedefault = null: expected directed or undirected"),
        (f"{HEAD}{NODES}{PATH}</graph>\n<edge source='a' target='c'/></graphml>", "line 3: <edge> outside of the graph"),
        (f"{HEAD}{NODES}{PATH}\n<Edge source='a' target='c'/>{TAIL}", "line 3: <Edge>: write <edge>"),
        (f"{HEAD}{NODES}{PATH}\n<edge source='a'/>{TAIL}", "line 3: an edge without a target"),
        (
            f"{WEIGHTED}\n<edge source='a' target='b'><data key='w'>0,5</data></edge>{TAIL}",
            "line 2: weight = '0,5', expected a number other than 0",
        ),
        (
            f"{HEAD}{NODES}<edge source='a' target='b'/>\n<edge source='b' target='c'><data key='w'>1</data></edge>{TAIL}",
            "line 3: data with the key 'w', which is not declared",
        ),
        (f"<!DOCTYPE graphml [\n<!ENTITY a 'b'>]>{HEAD}{TAIL}", "line 2: declares an entity: write the text itself"),
        (f"{HEAD}\n{NODES}", "line 3: cannot be read as XML: no element found"),
    ],
)  # fmt: skip
def test_graphml_that_networkx_would_read_in_part_is_refused(tmp_path, text, finding):
    assert findings(tmp_path, text, "net.graphml") == [finding]


def test_default_values_of_graphml_count(tmp_path):
    text = (
        f"{ELEMENT}{WEIGHT}<default>0.25</default></key><graph edgedefault='undirected'>{NODES}"
        f"<edge source='a' target='b'/><edge source='b' target='c'><data key='w'>0.5</data></edge>{TAIL}"
    )

    assert load(written(tmp_path, text, "net.graphml")).weights.tolist() == [0.25, 0.25, 0.5, 0.5]


def test_graphml_without_a_namespace_is_read(tmp_path):
    text = f"<graphml><graph edgedefault='directed'>{NODES}{PATH}<edge source='c' target='a' directed='true'/>{TAIL}"
    graph = load(written(tmp_path, text, "net.graphml"))

    assert graph.directed
    assert graph.num_edges == 3


@pytest.mark.parametrize(
    "text",
    [
        f'Creator "made without labels"\ngraph [\ndirected 0\n{GML_NODES}{GML_PATH}]',
        f'graph [\n{GML_NODES}edge [ source 1 target 2 label "line 12" ]\nedge [ source 2 target 3 label "line 23" ]\n]',
        f"# label\ngraph [ # [ \n{GML_NODES}{GML_PATH}]\n",
    ],
)  # fmt: skip
def test_gml_without_labels_of_nodes_has_ids_as_names(tmp_path, text):
    assert links(load(written(tmp_path, text, "net.gml"))) == {frozenset("12"), frozenset("23")}


def test_gml_with_labels_in_several_scripts(tmp_path):
    text = 'graph [ node [ id 1 label "Zürich" ] node [ id 2 label "Gen&#232;ve &amp; Co" ] edge [ source 2 target 1 weight .5 ] ]'
    graph = load(written(tmp_path, text, "net.gml"))

    assert graph.names == ("Genève & Co", "Zürich")
    assert graph.weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'graph [ node [ id 1 label "x" ] node [ id 2 label "?" ] node [ id 3 label "?" ]\n' + GML_PATH + "]",
            ["nodes: '?' is there 2 times"],
        ),
        (
            f"graph [\n{GML_NODES}{GML_PATH}edge [ source 2 target 1 ]\n]",
            ["line 7: 2 - 1 is there already, at line 5; keep one of them"],
        ),
        (
            'graph [\nnode [ id 1 label "x" ]\nnode [ id 2 ]\nedge [ source 1 target 2 ]\n]',
            ["line 3: a node without a label, but the node at line 2 has one; give it to all nodes or to none"],
        ),
        (f"graph [\n{GML_NODES}node [ id 2 ]\n{GML_PATH}]", ["line 5: a node with id 2 is there already, at line 3"]),
        (f"graph [\n{GML_NODES}{GML_PATH}edge [ source 3 target 4 ]\n]", ["line 7: target 4 is not the id of a node"]),
        (f"graph [\n{GML_NODES}{GML_PATH}edge [ source 3 ]\n]", ["line 7: an edge without a target"]),
        (f"graph [\n{GML_NODES}{GML_PATH}]\nedge [ source 1 target 3 ]\n", ["line 8: edge outside of the graph"]),
        (f"graph [\n{GML_NODES}{GML_PATH}Edge [ source 1 target 3 ]\n]", ["line 7: 'Edge': write edge"]),
        (f'graph [\ndirected "0"\n{GML_NODES}{GML_PATH}]', ["line 2: directed '0': expected 0 or 1"]),
        (
            f"graph [\n{GML_NODES}edge [ source 1 target 2 weight 0.5 weight 1 ]\nedge [ source 2 target 3 weight 1 ] ]",
            ["line 5: the edge has weight 2 times; expected once"],
        ),
        (
            f"graph [\n{GML_NODES}edge [ source 1 target 2 Weight 0.5 ]\nedge [ source 2 target 3 Weight 1 ]\n]",
            ["line 5: 'Weight' = 0.5: write weight", "line 6: 'Weight' = 1: write weight"],
        ),
        (
            f"graph [\n{GML_NODES}edge [ source 1 target 2 weight 0,5 ]\n]",
            ["line 5: '0,5 ]': expected a key, a number, a text in quotes, [ or ]"],
        ),
        ('graph [\nnode [ id 1 label "x ] ]', ["line 2: '\"x ] ]': a quotation mark that is not closed"]),
        ("graph [\nnode [ id 1 ]", ["line 1: a bracket that is not closed"]),
        (
            f"graph [ {GML_NODES}{GML_PATH}]\ngraph [ ]",
            ["holds 2 graphs: expected one, graph [ node [ id 1 ] ... edge [ source 1 target 2 ] ... ]"],
        ),
    ],
)
def test_gml_is_refused_with_its_line(tmp_path, text, expected):
    assert findings(tmp_path, text, "net.gml") == expected


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ('{%s, "edges": [], "edges": [%s]}', "the key 'edges' is given twice in one object"),
        ('{%s, "links": [], "edges": [%s]}', "has edges and links: keep one of them"),
        ('{"Directed": true, %s, "edges": [%s]}', "'Directed': write 'directed'"),
        ('{%s, "edges": [%s, {"source": null, "target": "b"}]}', "edges[1]: None is not a node; the nodes are a, b, None"),
        ('{%s,\n "edges": [%s,, 1]}', "line 2, column 43: cannot be read as JSON: Expecting value"),
        ('{%s, "edges": [%s, "ab"]}', """edges[1] = 'ab': expected {"source": ..., "target": ...}"""),
    ],
)
def test_json_that_would_lose_something_is_refused(tmp_path, text, finding):
    nodes = '"nodes": [{"id": "a"}, {"id": "b"}, {"id": "None"}]'

    assert findings(tmp_path, text % (nodes, '{"source": "a", "target": "b"}'), "net.json") == [finding]


def test_names_that_are_the_same_as_text_are_given_twice(tmp_path):
    text = '{"nodes": [{"id": 1}, {"id": "1"}, {"id": "b"}], "edges": [{"source": "1", "target": "b"}]}'

    assert findings(tmp_path, text, "net.json") == ["nodes: '1' is there 2 times"]


@pytest.mark.parametrize("name", ["net.graphml", "net.gml", "net.edgelist"])
def test_large_graphs_of_networkx_come_back_edge_for_edge(tmp_path, name):
    graph = nx.connected_watts_strogatz_graph(60, 4, 0.3, seed=1)
    {"net.graphml": nx.write_graphml, "net.gml": nx.write_gml, "net.edgelist": nx.write_edgelist}[name](graph, tmp_path / name)

    assert links(load(tmp_path / name)) == {frozenset((str(a), str(b))) for a, b in graph.edges}


def test_the_examples_of_the_document_are_read(tmp_path):
    blocks = re.findall(r"(?:^    .*\n)+", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    yaml, edge_list = (textwrap.dedent(block) for block in blocks)
    with pytest.raises(TopologyError) as caught:
        load(written(tmp_path, yaml, "net.yaml"))

    assert all("give it for all" in finding for finding in caught.value.findings)  # what the sentence below the example says
    assert load(written(tmp_path, edge_list, "net.txt")).names == ("Boston", "Chicago", "New York")
