"""Edge lists of other programs are read right, or refused with the line."""

from __future__ import annotations

import pytest

from p2pfl.errors import TopologyError
from p2pfl.topology import load

BOTH_WAYS = "keep one line a link, or begin the file with '% sym' if both lines are one link, with '% asym' if directions are meant"

MATRIX = "expected '%%MatrixMarket matrix coordinate … symmetric'"
SYMMETRIC = "%%MatrixMarket matrix coordinate pattern symmetric\n"
DIRECTED = "a list is read as undirected: begin the file with '% asym', or leave this line out"
ENCLOSED = "a bracket, a colon or a quotation mark around a name: put names in double quotes, and nothing else"
ALIKE = "is written with different Unicode signs that look alike: write it in one way"


def written(tmp_path, text):
    path = tmp_path / "net.edgelist"
    path.write_bytes(text.encode())
    return path


def findings(tmp_path, text):
    with pytest.raises(TopologyError) as caught:
        load(written(tmp_path, text))
    return list(caught.value.findings)


def links(graph):
    return {(graph.label(i), graph.label(j)) for i, j in zip(graph.senders.tolist(), graph.receivers.tolist(), strict=True)}


def undirected(*pairs):
    return {*pairs, *((b, a) for a, b in pairs)}


@pytest.mark.parametrize(
    "text",
    [
        "basel bern\nbern chur\nchur basel\n",
        "basel, bern\nbern, chur\nchur, basel\n",
        "basel,bern\r\nbern,chur\r\nchur,basel\r\n",
        "basel;bern\n\nbern;chur\nchur;basel",
        "basel\tbern\nbern\tchur\nchur \t basel\n",
        "# a comment\nbasel bern # said of a link\nbern chur\n  # another\nchur basel\n",
        "% sym unweighted\n% 3 3 3\nbasel bern\nbern chur\nchur basel\n",
        '"basel" "bern"\nbern "chur"\nchur basel\n',
        "source target\nbasel bern\nbern chur\nchur basel\n",
        "From,To\nbasel,bern\nbern,chur\nchur,basel\n",
        "basel bern {'color': '#ff0000'}\nbern chur {}\nchur basel {}\n",
        "basel bern\rbern chur\rchur basel\r",
    ],
)
def test_lists_of_many_programs_are_one_triangle(tmp_path, text):
    graph = load(written(tmp_path, text))

    assert graph.names == ("basel", "bern", "chur")
    assert links(graph) == undirected(("basel", "bern"), ("bern", "chur"), ("basel", "chur"))
    assert graph.weights is None


def test_quoted_names_may_hold_spaces_signs_and_quotes(tmp_path):
    graph = load(written(tmp_path, '"New York","Los #1, Angeles"\n"Los #1, Angeles","the ""Hub"""\n'))

    assert graph.names == ("Los #1, Angeles", "New York", 'the "Hub"')


@pytest.mark.parametrize(
    "text", ["source target weight\na b 0.25\nb c 5e-1\n", "a;b;0.25\nb;c;.5\n", "a,b,{'weight': 0.25}\nb,c,{'weight': 0.5}\n"]
)
def test_a_third_column_is_the_weight(tmp_path, text):
    assert load(written(tmp_path, text)).weights.tolist() == [0.25, 0.25, 0.5, 0.5]


def test_konects_word_for_directed_is_heard(tmp_path):
    graph = load(written(tmp_path, "% asym\n1 2\n2 3\n3 1\n"))

    assert graph.directed
    assert links(graph) == {("1", "2"), ("2", "3"), ("3", "1")}


def test_a_matrix_of_matrix_market_is_read_with_its_size(tmp_path):
    graph = load(written(tmp_path, "%%MatrixMarket matrix coordinate pattern symmetric\n%\n3 3 3\n2 1\n3 1\n3 2\n"))

    assert links(graph) == undirected(("1", "2"), ("1", "3"), ("2", "3"))


APART = "topology net is not connected: nothing from a can reach u; add an edge on the way between them"


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("a b\nbasel\n", "line 2: 'basel': expected two names with a space between"),
        ("a,b\nbasel\n", "line 2: 'basel': expected two names with a comma between"),
        ("a b\nb,c\n", "line 2: 'b,c': separated by ',', but line 1 by spaces; separate all lines in one way"),
        ("a,b\nb c\n", "line 2: 'b c': separated by spaces, but line 1 by ','; separate all lines in one way"),
        ("1 2 1 1082040961\n", "line 1: '1 2 1 1082040961': 4 columns, expected two names, or two names and a weight"),
        ("a,b,0,5\n", "line 1: 'a,b,0,5': 4 columns, expected two names, or two names and a weight; write decimals with a point"),
        ("a b 0,5\n", "line 1: 'a b 0,5': spaces and ',' between names: put names with spaces in quotes, write decimals with a point"),
        ("a;b;0,5\n", "line 1: 'a;b;0,5': weight '0,5': expected a number with a decimal point, not a comma"),
        ("a b 1\nb c 1_000\n", "line 2: 'b c 1_000': weight '1_000': expected a number"),
        ("a b nan\n", "line 1: 'a b nan': weight 'nan': expected a number; leave a header out"),
        ("clinic partner strength\na b 1\n", "line 1: 'clinic partner strength': weight 'strength': expected a number; leave a header out"),
        ("New York\tBoston\n", "line 1: 'New York\\tBoston': spaces and tabs between names: put names with spaces in quotes"),
        ("New York,Boston\n", "line 1: 'New York,Boston': spaces and ',' between names: put names with spaces in quotes"),
        ('a "b\n', "line 1: 'a \"b': a quotation mark that is not closed"),
        ('a"b c\n', "line 1: 'a\"b c': a quotation mark inside a name: put the name in quotes and write it twice"),
        ('a ""\n', "line 1: 'a \"\"': an empty name"),
        ("a,\n", "line 1: 'a,': an empty name"),
        ("'New York' 'Boston'\n", "line 1: \"'New York' 'Boston'\": expected double quotes around names"),
        ("a b#c\n", "line 1: 'a b#c': '#' inside a name: put the name in quotes, or a space before a comment"),
        ("a b {'weight': \n", "line 1: \"a b {'weight':\": expected values as {'weight': 0.5}"),
        ("a b {'weight': 1} x\n", "line 1: \"a b {'weight': 1} x\": expected values as {'weight': 0.5}"),
        ("a b\nb a\n", "line 2: b - a is there already, at line 1; keep one of them"),
        ("a b 1\n\nb c\n", "line 3: no weight, but line 1 has one; give it for all edges or for none"),
        ("clinic partner\na b\nb c\n", "line 1: 'clinic partner': no other line has these names: leave a header out"),
        ("u,v\na,b\n", f"{APART}; line 1, 'u,v', may be a header: leave it out then"),
        ("1 2\n3 4\n", APART.replace("from a can reach u", "from 1 can reach 3")),
        ("a b\nb c//x\n", "line 2: 'b c//x': expected # before a comment, or the name in quotes"),
        ("a b\nb,c //x\n", "line 2: 'b,c //x': expected # before a comment, or the name in quotes"),
        ("[a, b]\n", f"line 1: '[a, b]': {ENCLOSED}"),
        ("“a” b\n", f"line 1: '“a” b': {ENCLOSED}"),
        ("a: b\n", f"line 1: 'a: b': {ENCLOSED}"),
        ("// a comment\na b\nb c\n", "line 1: '// a comment': expected # before a comment, or the name in quotes"),
        ("a, b;c\n", "line 1: 'a, b;c': commas and ';' between names: put names with commas in quotes"),
        ("% sym\n% asym\na b\n", "line 2: '% asym': line 1 says otherwise; keep one of them"),
        ("a b\nb\u00a0c d\n", "nodes: 'b\\xa0c' holds U+00A0, which cannot be seen: take it out"),
        ("a b\na \ufeffb\n", "nodes: '\\ufeffb' holds U+FEFF, which cannot be seen: take it out"),
        ("zu\u0308ri bern\nz\u00fcri bern\n", f"nodes: 'züri' {ALIKE}"),
        ("% bip\n1 1\n", "line 1: '% bip': a graph of two kinds of nodes, expected one kind: '% sym' or '% asym'"),
        ("%%MatrixMarket matrix array real general\n", f"line 1: '%%MatrixMarket matrix array real general': {MATRIX}"),
        (f"{SYMMETRIC}3 4 2\n2 1\n3 1\n", "line 2: '3 4 2': expected rows, columns (as many) and entries"),
        (f"{SYMMETRIC}3 3 3\n2 1\n3 1\n", "line 2: '3 3 3': says 3 entries, there are 2"),
        (f"{SYMMETRIC}3 3 2\n2 1\n4 1\n", "line 4: '4 1': expected numbers from 1 to 3"),
        ("# Directed graph (each pair once)\n0 1\n1 2\n", f"line 1: '# Directed graph (each pair once)': {DIRECTED}"),
    ],
)  # fmt: skip
def test_a_list_is_refused_with_its_line(tmp_path, text, finding):
    assert findings(tmp_path, text) == [finding]


def test_two_slashes_of_an_address_or_in_quotes_are_no_comment(tmp_path):
    assert links(load(written(tmp_path, 'http://a b\nb "c//x"\n'))) == undirected(("http://a", "b"), ("b", "c//x"))


def test_a_list_with_each_link_in_both_directions_gets_one_sentence(tmp_path):
    text = "# Directed graph: email\n" + "".join(f"{i}\t{(i + 1) % 200}\n{(i + 1) % 200}\t{i}\n" for i in range(200))

    assert findings(tmp_path, text) == [f"each link is there in both directions, 0 - 1 at line 2 and line 3: {BOTH_WAYS}"]
    assert load(written(tmp_path, "% asym\n" + text)).num_edges == 400
    assert load(written(tmp_path, "% sym\n" + text)).num_edges == 200


def test_a_link_in_both_directions_with_different_weights_is_refused_even_where_the_list_says_sym(tmp_path):
    text = "% sym\na b 0.5\nb a 0.25\nb c 0.5\n"

    assert findings(tmp_path, text) == [
        "line 3: b - a has weight 0.25, but weight 0.5 at line 2; give both directions the same, or begin the file with '% asym'"
    ]


def test_a_line_written_twice_is_refused_even_where_the_list_says_sym(tmp_path):
    assert findings(tmp_path, "% sym\na b\na b\nb c\n") == ["line 3: a - b is there already, at line 2; keep one of them"]


def test_thousands_of_lines_are_summed_up(tmp_path):
    with pytest.raises(TopologyError) as caught:
        load(written(tmp_path, "alone\n" * 2000))

    assert len(str(caught.value).splitlines()) == 12
