"""A site's own settings, read and checked."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from p2pfl.errors import ConfigError
from p2pfl.governance.identity import Identity
from p2pfl.node.site import SiteFile

DIGEST = "0123456789abcdef" * 4
LEAST = "member: hungary\nstudy: study.yaml\n"
IDENTITY = Identity.new()


@pytest.fixture
def site(tmp_path):
    def load(text):
        (tmp_path / "site.yaml").write_text(text)
        return SiteFile.load(tmp_path / "site.yaml")

    return load


def test_defaults(site, tmp_path):
    assert site(LEAST) == SiteFile(
        member="hungary",
        study=tmp_path / "study.yaml",
        keys=tmp_path / "keys",
        confirmed=None,
        listen=None,
        state=tmp_path / "state",
        task={},
        passphrase_file=None,
        threads=1,
        status_port=None,
        status_listen=None,
        state_group=None,
        linger_s=30.0,
        greet_timeout_s=None,
        deadline_floor_s=30.0,
        deadline_factor=5.0,
        heartbeat_s=2,
    )


def test_paths_are_beside_the_file_wherever_one_stands(site, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/admin")
    site(LEAST)
    monkeypatch.chdir(tmp_path.parent)
    (tmp_path / "site.yaml").write_text(
        "member: hungary\nstudy: ../shared/study.yaml\nkeys: /etc/p2pfl/keys\nstate: ~/state\npassphrase_file: secret\n"
        "task: {data: ./data, other: ~/x, up: ../y, name: plain, share: 0.5, url: data/z}\n"
    )
    found = SiteFile.load(Path(tmp_path.name) / "site.yaml")

    assert found.study == tmp_path / "../shared/study.yaml"
    assert found.keys == Path("/etc/p2pfl/keys")
    assert found.state == Path("/home/admin/state")
    assert found.passphrase_file == tmp_path / "secret"
    assert found.task == {
        "data": str(tmp_path / "data"),
        "other": "/home/admin/x",
        "up": str(tmp_path / "../y"),
        "name": "plain",
        "share": 0.5,
        "url": "data/z",
    }


def test_a_home_folder_of_nobody_is_told_with_its_key(site):
    with pytest.raises(ConfigError) as told:
        site("member: hungary\nstudy: ~nobody-here/study.yaml\nstate: ~nobody-here/state\n")
    assert [finding.partition(":")[0] for finding in told.value.findings] == [
        "study = '~nobody-here/study.yaml'",
        "state = '~nobody-here/state'",
    ]


@pytest.mark.parametrize(
    "written",
    [DIGEST, DIGEST.upper(), " ".join(DIGEST[i : i + 4] for i in range(0, 64, 4)), "-".join(DIGEST[i : i + 4] for i in range(0, 64, 4))],
)
def test_a_confirmed_digest_in_groups_or_not(site, written):
    assert site(LEAST + f"confirmed: {written}\n").confirmed == DIGEST


def test_a_confirmed_digest_over_two_lines(site):
    groups = " ".join(DIGEST[i : i + 4] for i in range(0, 64, 4))

    assert site(LEAST + f"confirmed: >\n  {groups[:39]}\n  {groups[40:]}\n").confirmed == DIGEST


def test_all_faults_at_once_with_key_value_and_what_is_allowed(site, tmp_path):
    with pytest.raises(ConfigError) as caught:
        site(
            "member: a b\nconfirmed: yes, it is right\nlisten: 7700\nlinger: 3\nthreads: 0\nstatus_port: 70000\ndeadline_factor: 0.5\n"
            "heartbeat_s: -1\nkeys: 3\n"
        )

    assert caught.value.place == str(tmp_path / "site.yaml")
    assert sorted(caught.value.findings) == [
        "confirmed = 'yes, it is right': expected 64 hex digits, in groups or not",
        "deadline_factor = 0.5: must be >= 1.0",
        "heartbeat_s = -1: must be >= 1",
        "keys = 3: expected a path",
        f"linger = 3: unknown key, did you mean linger_s? one of {', '.join(field.name for field in fields(SiteFile))}",
        "listen = 7700: expected a text",
        "member = 'a b': expected 1 to 64 of A-Z a-z 0-9 . _ -, not starting with '.'",
        "status_port = 70000: must be <= 65535",
        "study: required, but missing",
        "threads = 0: must be >= 1",
    ]


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("", ("127.0.0.1", 0)),
        ("status_port: 9464\n", ("127.0.0.1", 9464)),
        ("status_listen: 127.0.0.1:9464\n", ("127.0.0.1", 9464)),
        ("status_listen: '[::1]:9464'\n", ("::1", 9464)),
        ("status_listen: 0.0.0.0:9464\n", ("0.0.0.0", 9464)),
        ("status_listen: '[0::0]:0'\n", ("::", 0)),
    ],
)
def test_where_the_status_page_listens(site, written, address):
    assert site(LEAST + written).status_address == address


@pytest.mark.parametrize(
    "written", ["9464", "'9464'", "localhost:9464", "127.0.0.1", "::1:9464", "'[127.0.0.1]:1'", "127.0.0.1:65536", "127.0.0.1:-1"]
)
def test_a_status_page_somewhere_else_is_refused(site, written):
    with pytest.raises(ConfigError, match="status_listen = "):
        site(LEAST + f"status_listen: {written}\n")


def test_two_places_for_the_status_page_are_refused(site):
    with pytest.raises(ConfigError, match="status_port and status_listen: both say where the status page is; keep one of them"):
        site(LEAST + "status_port: 0\nstatus_listen: 127.0.0.1:9464\n")


@pytest.mark.parametrize(("written", "group"), [("backup", "backup"), ("34", 34)])
def test_a_group_may_be_let_into_the_state(site, written, group):
    assert site(LEAST + f"state_group: {written}\n").state_group == group


def test_waiting_times_are_finite(site):
    for key in ("linger_s", "greet_timeout_s", "deadline_floor_s", "deadline_factor", "heartbeat_s"):
        for value in (".inf", ".nan", "soon"):
            with pytest.raises(ConfigError, match=f"{key} = "):
                site(LEAST + f"{key}: {value}\n")


@pytest.mark.parametrize("listen", ["tcp://0.0.0.0:7700", "tcp://*:1", "tcp://[::]:65535", "tcp://eth0:7700"])
def test_where_one_may_listen(site, listen):
    assert site(LEAST + f"listen: '{listen}'\n").listen == listen


@pytest.mark.parametrize(
    "listen", ["tcp://0.0.0.0", "tcp://:7700", "tcp://a:0", "tcp://a:65536", "ipc:///tmp/a", "0.0.0.0:7700", "tcp://a:x"]
)
def test_where_one_may_not_listen(site, listen):
    with pytest.raises(ConfigError, match=r"listen = .*: expected tcp://"):
        site(LEAST + f"listen: '{listen}'\n")


def test_a_site_listens_at_its_cards_port_unless_told_otherwise(site):
    reachable, dialling = IDENTITY.card("hungary", "tcp://node.hungary.example:7700"), IDENTITY.card("hungary")

    assert site(LEAST).listens_at(reachable) == "tcp://*:7700"
    assert site(LEAST + "listen: tcp://10.1.2.3:9\n").listens_at(reachable) == "tcp://10.1.2.3:9"
    assert site(LEAST).listens_at(dialling) is None
    several = IDENTITY.card("hungary", ["tcp://node.hungary.example:7700", "tcp://[2001:db8::7]:7700"])
    assert site(LEAST).listens_at(several) == "tcp://*:7700"
    with pytest.raises(ConfigError, match="have the ports 7700, 7800; say which one to listen at here, such as tcp://"):
        site(LEAST).listens_at(IDENTITY.card("hungary", ["tcp://a.example:7800", "tcp://b.example:7700"]))
    with pytest.raises(ConfigError, match="the card of hungary has no address"):
        site(LEAST + "listen: tcp://10.1.2.3:9\n").listens_at(dialling)


def test_a_proxy_with_its_password_from_a_file_or_a_variable(site, tmp_path, monkeypatch):
    (tmp_path / "password").write_text("open sesame\n")
    (tmp_path / "password").chmod(0o600)
    given = site(LEAST + "proxy: {address: 'http://proxy.hospital.example:3128', user: site, password_file: password}\n").proxy
    assert given is not None

    found = given.proxy()

    assert (found.kind, found.host, found.port, found.user, found.password) == (
        "http",
        "proxy.hospital.example",
        3128,
        "site",
        "open sesame",
    )
    assert "sesame" not in repr(found) + repr(given) + str(found)

    monkeypatch.setenv("P2PFL_PROXY_PASSWORD", "from there")
    named = site(LEAST + "proxy: {address: 'socks5://[2001:db8::7]:1080', user: site}\n").proxy

    assert named is not None
    assert (named.proxy().host, named.proxy().password) == ("2001:db8::7", "from there")


@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        ("{address: 'proxy:3128'}", "proxy.address = 'proxy:3128': expected http://host:port or socks5://host:port"),
        ("{address: 'http://site:sesame@proxy:3128'}", "proxy.address: no user and no password belong into it"),
        ("{address: 'http://proxy:3128', user: 'a:b'}", "proxy.user = 'a:b': expected 1 to 255 bytes without a colon"),
        ("{address: 'http://proxy:3128', user: site}", "proxy.user = 'site': no password; write proxy.password_file"),
        ("{address: 'http://proxy:3128', password_file: password}", "whose password is it? Write proxy.user, too"),
        ("{address: 'http://proxy:3128', user: site, password_file: nowhere}", "no such file"),
        ("{address: 'http://proxy:3128', user: site, password_file: open}", "mode 0644, others may use it; run: chmod 600"),
        ("{address: 'http://proxy:3128', user: site, password_file: empty}", "expected one line of 1 to 255 bytes"),
    ],
)
def test_faults_of_a_proxy_are_named_and_no_password_is_shown(site, tmp_path, proxy, said):
    for name, text, mode in (("open", "sesame", 0o644), ("empty", "\n", 0o600), ("password", "sesame", 0o600)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(mode)
    with pytest.raises(ConfigError) as error:
        site(f"{LEAST}proxy: {proxy}\n").proxy.proxy()

    assert said in str(error.value)
    assert "sesame" not in str(error.value)


def test_a_broker_with_its_password_from_a_file_or_a_variable(site, tmp_path, monkeypatch):
    (tmp_path / "password").write_text("open sesame\n")
    (tmp_path / "password").chmod(0o600)
    given = site(LEAST + "mqtt: {host: broker.example, username: site, password_file: password, ca_file: ca.pem}\n").mqtt
    found = given.broker()

    assert (found.address, str(found)) == ("tcp://broker.example:8883", "mqtts://broker.example:8883")
    assert (found.username, found.password, found.version, found.keepalive_s) == ("site", "open sesame", "5", 20)
    assert found.ca_file == tmp_path / "ca.pem"
    assert "sesame" not in repr(found)

    monkeypatch.setenv("P2PFL_MQTT_PASSWORD", "from there")
    plain = site(LEAST + "mqtt: {host: '2001:db8::7', tls: false, username: site, version: 3.1.1, keepalive: 5}\n").mqtt.broker()

    assert (plain.address, plain.password, plain.version, plain.keepalive_s) == ("tcp://[2001:db8::7]:1883", "from there", "3.1.1", 5)
    assert site(LEAST + "mqtt: {host: broker, version: 5}\n").mqtt.broker().version == "5"
    assert site(LEAST + "mqtt: {host: broker}\n").mqtt.broker().password is None


@pytest.mark.parametrize(
    ("mqtt", "said"),
    [
        ("{host: 'tcp://broker:1883'}", "mqtt.host = 'tcp://broker:1883': expected a host's name or its numeric address"),
        ("{host: broker, port: 0}", "mqtt.port = 0"),
        ("{host: broker, version: 3.1}", "mqtt.version = 3.1"),
        ("{host: broker, packet_bytes: 100}", "mqtt.packet_bytes = 100"),
        ("{host: broker, passwort: x}", "mqtt.passwort"),
        ("{host: broker, password_file: password}", "whose password is it? Write mqtt.username, too"),
        ("{host: broker, ca_file: ca.pem, tls: false}", "is for TLS, and mqtt.tls is false; leave one of them out"),
        ("{host: broker, username: site}", "mqtt.username = 'site': no password; write mqtt.password_file"),
        ("{host: broker, username: site, password_file: nowhere}", "no such file; write the password into it, and run: chmod 600"),
        ("{host: broker, username: site, password_file: open}", "mode 0644, others may use it; run: chmod 600"),
    ],
)
def test_faults_of_a_broker_are_named_and_no_password_is_shown(site, tmp_path, mqtt, said):
    (tmp_path / "open").write_text("sesame")
    (tmp_path / "open").chmod(0o644)
    with pytest.raises(ConfigError) as told:
        site(f"{LEAST}mqtt: {mqtt}\n").mqtt.broker()

    assert said in str(told.value)
    assert "sesame" not in str(told.value)


def test_the_table_of_a_site_is_read_with_all_its_faults(site, tmp_path):
    found = site(
        f"{LEAST}contract: ../study/contract.yaml\ntable: {{file: rows.csv, decimal: comma, units: {{lab: mg/dl}}, columns: {{sex: 4}}}}\n"
    )

    assert (found.table.file, found.table.format.decimal, found.table.columns) == ("rows.csv", "comma", {"sex": 4})
    assert (found.contract, found.cohort) == (tmp_path / "../study/contract.yaml", None)
    assert site(LEAST).table is None
    with pytest.raises(ConfigError) as error:
        site(f"{LEAST}treads: 2\ntable: {{fil: rows.csv, decimal: point, thousands: point, columns: {{sex: 0}}}}\n")
    assert [finding.partition(":")[0] for finding in error.value.findings] == [
        "treads = 2",
        "table.thousands = 'point'",
        "table.file",
        "table.fil = 'rows.csv'",
    ]
    for table in ("rows.csv", "[rows.csv]", "{}"):
        with pytest.raises(ConfigError, match=r"^.*site\.yaml: table"):
            site(f"{LEAST}table: {table}\n")


def test_to_read_a_policy_costs_no_library_of_analyses():
    program = "import sys, p2pfl.node.site; print(*sorted({'scipy', 'torch', 'p2pfl.analyses.spec'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "\n"
