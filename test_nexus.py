#!/usr/bin/env python3
"""The tests of nexus: python3 test_nexus.py [-k NAME] [-v], with nothing but Python.

Real servers on port 0, real sockets, real processes where processes matter; time is passed in, so
nothing sleeps to see something expire. What needs a counterpart that is not there says so and is
skipped. Two more commands live here:

    python3 test_nexus.py bench                 ratios against the stock http.server, side by side
    python3 test_nexus.py fuzz --minutes 10     the seeded fuzzer, for longer than in the tests
"""
import argparse
import array
import base64
import bisect
import collections
import contextlib
import functools
import gc
import hashlib
import hmac
import http.client
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import random
import re
import selectors
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, FOLDER)
sys.dont_write_bytecode = True          # running the tests leaves no __pycache__ behind
import nexus  # noqa: E402  (the folder has to be on the path first)

NEXUS = os.path.join(FOLDER, "nexus.py")
README = os.path.join(FOLDER, "README.md")
# How tests start it: as a module it is compiled once, into a folder that goes with the tests, and
# not at each start. -S: what site loads on this machine is not ours.
CACHE = tempfile.TemporaryDirectory(prefix="nexus-cache-")
COMMAND = [sys.executable, "-S", "-c", "import sys, nexus; sys.exit(nexus.main())"]
SCRIPT = [sys.executable, NEXUS]        # and how its users do

# ----------------------------------------------------------------------------------------
# Tools
#
# A server in this process (fast, with a clock that tests turn), a server in a process of its own
# (to be killed), a command line with a home of its own, and raw sockets. What happens between two
# threads is waited for (until) or brought about (between), never slept for.
# ----------------------------------------------------------------------------------------


class TestClock:
    """now() stands still until a test turns it, so that the very end of a thing can be looked at.

    monotonic() goes on by itself, because long polls sleep by it; advance() moves both.
    """

    def __init__(self):
        self._now, self._ahead = 1700000000000, 0.0

    def monotonic(self):
        return time.monotonic() + self._ahead

    def now(self):
        return self._now

    def advance(self, seconds):
        self._now, self._ahead = self._now + round(seconds * 1000), self._ahead + seconds


def until(condition, seconds=10):
    """Wait until condition() is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("it never happened")
        time.sleep(0.002)


class Started:
    """A call in a thread of its own; result() is what it returned, or raises what it raised."""

    def __init__(self, function, *args, **values):
        self._call, self._outcome = (function, args, values), []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        function, args, values = self._call
        try:
            self._outcome[:] = function(*args, **values), None
        except BaseException as trouble:
            self._outcome[:] = None, trouble

    def done(self):
        """Has it returned?"""
        return not self._thread.is_alive()

    def result(self, timeout=10):
        """What it returned, within `timeout` seconds."""
        self._thread.join(timeout)
        if not self._outcome:
            raise AssertionError("still waiting after %s seconds" % timeout)
        if self._outcome[1]:
            raise self._outcome[1]
        return self._outcome[0]


@contextlib.contextmanager
def patched(thing, name, value):
    """An attribute has another value for a while."""
    getattr(thing, name)                        # it must be there
    before = vars(thing).get(name, patched)     # as it is: a static method, say; or inherited
    setattr(thing, name, value)
    try:
        yield
    finally:
        if before is patched:
            delattr(thing, name)
        else:
            setattr(thing, name, before)


@contextlib.contextmanager
def between(thing, name, act, before=False, skip=0):
    """At the next call of thing.name, by whatever thread, act() runs right after it or `before`.

    act() runs in that thread, between two of its steps, and may call thing.name itself. `skip`
    calls pass before.
    """
    original, turn = getattr(thing, name), iter([None] * skip + [act])

    def wrapped(*args, **values):
        mine = next(turn, None)
        if mine and before:
            mine()
        found = original(*args, **values)
        if mine and not before:
            mine()
        return found
    with patched(thing, name, wrapped):
        yield


Answer = collections.namedtuple("Answer", "status headers json text")


class Lines(nexus.Log):
    """A log that keeps its lines in a list."""

    def __init__(self, lines):
        super().__init__()
        self._kept = lines

    def __call__(self, line):
        self._kept.append(line)


class Cluster:
    """Databases in the PostgreSQL of NEXUS_TEST_POSTGRES, a URL of who may make some.

    `why` says why there are none. The driver may lie in the folder NEXUS_TEST_PSYCOPG.
    """

    def __init__(self):
        self.url, self._free, self._made = os.environ.get("NEXUS_TEST_POSTGRES"), [], {}
        self.path, self.why = os.environ.get("NEXUS_TEST_PSYCOPG"), None
        if not self.url:
            self.why = "NEXUS_TEST_POSTGRES is not set"
            return
        if self.path:
            sys.path.append(self.path)
        try:
            import psycopg
            self._connect = psycopg.connect
        except ImportError:
            self.why = "psycopg is not installed for this Python"

    def run(self, *statements, url=None):
        """Run statements as whoever owns the cluster; returns the rows of the last one, if any."""
        with self._connect(url or self.url, autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else None

    def database(self, name=":memory:"):
        """The URL of an empty database; of the same one for the same name of a file."""
        if name not in self._made:
            url = self._free.pop() if self._free else None
            if not url:
                own = "nexus_test_%d_%d" % (os.getpid(), len(self._made))
                url = re.sub(r"/[^/?]*(?=$|\?)", "/" + own, self.url)
                self.run("CREATE DATABASE " + own)
                self._made[own] = url
            if name == ":memory:":
                return url
            self._made[name] = url
        return self._made[name]

    def give_back(self, url):
        """Nobody needs this database any more."""
        self.run("DROP SCHEMA IF EXISTS nexus CASCADE", url=url)
        self._free.append(url)

    def close(self):
        """Drop them all."""
        for name in self._made:
            if name.startswith("nexus_test_"):
                self.run("DROP DATABASE IF EXISTS %s WITH (FORCE)" % name)


CLUSTER = Cluster()


def tearDownModule():
    CLUSTER.close()


class Server:
    """A nexus server in this process on a free port; use as a context manager or stop() it.

    Keyword arguments are settings. `clock` is a TestClock, one that was used before if it is given.
    The background expiry is off unless sweeping=True: call sweep(). `lines` holds what the server
    logged; stop() raises if something is there that the test did not take out.
    """

    postgres = False                    # while classes made by on_postgres() run

    def __init__(self, sweeping=False, clock=None, **settings):
        settings.setdefault("db", ":memory:")
        settings.setdefault("port", 0)
        self._lent = None
        if Server.postgres:
            self._lent = settings["db"] == ":memory:"
            settings["db"] = CLUSTER.database(settings["db"])
        self.clock, self.lines = clock or TestClock(), []
        self.settings = nexus.Settings(settings)
        start = nexus.Store.start
        if not sweeping:
            nexus.Store.start = lambda store: None
        try:
            self.server = nexus.make_server(self.settings, self.clock)
        finally:
            nexus.Store.start = start
        self.store, self.app = self.server.app.store, self.server.app
        self.port, self.url = self.server.server_port, self.server.url
        self._log, nexus.log = nexus.log, Lines(self.lines)
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.004,),
                                        daemon=True)    # seconds that shutdown() may take
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self, seconds=1.5):
        """Stop the server as SIGTERM would; nothing may have been logged unseen."""
        if self._thread is None:
            return
        self.server.shutdown()
        self.server.stop(seconds)
        self._thread.join()
        self._thread, nexus.log = None, self._log
        if self._lent:
            CLUSTER.give_back(self.settings.db)
        if self.lines:
            raise AssertionError("the server logged: %r" % self.lines)

    def sweep(self):
        """One expiry run, now."""
        return self.store.sweep()

    def client(self, **options):
        """A nexus.Client on this server."""
        return nexus.Client(self.url, **options)

    def call(self, method, path, body=None, agent=None, key=None, headers=None, timeout=30):
        """One request on a connection of its own: an Answer. `body` is JSON, or bytes as it is."""
        headers = dict(headers or {})
        if agent is not None:
            headers["X-Agent-Id"] = agent
        if key is not None:
            headers["X-Session-Key"] = key
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers)
            found = connection.getresponse()
            raw = found.read()
        finally:
            connection.close()
        names = {name.lower(): value for name, value in found.getheaders()}
        text = raw.decode("utf-8")
        is_json = names.get("content-type", "").startswith("application/json") and text
        return Answer(found.status, names, json.loads(text) if is_json else None, text)

    def raw(self, data, timeout=5, half_close=False):
        """Bytes in, all bytes out until the server closes or `timeout` seconds are silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as sock:
            try:
                sock.sendall(data)
                if half_close:
                    sock.shutdown(socket.SHUT_WR)
                parts = []
                while True:
                    part = sock.recv(65536)
                    if not part:
                        break
                    parts.append(part)
            except (socket.timeout, ConnectionError):
                pass
            return b"".join(parts)

    def session(self, agents=("ada",), **values):
        """(session id, {agent: key}): a session with these agents, the first one its creator."""
        found = self.call("PUT", "/v1/sessions", dict(values, creatorAgentId=agents[0])).json
        keys = {agents[0]: found["sessionKey"]}
        for agent in agents[1:]:
            keys[agent] = self.call("POST", "/v1/sessions/%s/join" % found["sessionId"],
                                    agent=agent).json["sessionKey"]
        return found["sessionId"], keys

    def send(self, session_id, agent, text, key=None, **values):
        """Send a session message: an Answer."""
        return self.call("POST", "/v1/sessions/%s/messages" % session_id,
                         dict(values, text=text), agent, key)

    def poll(self, session_id, agent, query=""):
        """Poll a session: an Answer."""
        return self.call("GET", "/v1/sessions/%s/messages%s" % (session_id, query), agent=agent)


class Process:
    """A server in a process of its own, to be killed. `url` once it is up; stop() is SIGTERM."""

    def __init__(self, folder, *flags, command=COMMAND, **environ):
        self.folder, self._ended = folder, None
        self._errors = tempfile.NamedTemporaryFile()
        if Server.postgres:
            flags += ("--db", CLUSTER.database(folder))
        self.process = subprocess.Popen(
            command + ["serve", "--port", "0"] + list(flags), cwd=folder,
            env=clean_environment(folder, **environ), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=self._errors)
        line = self.process.stdout.readline()
        self.url = json.loads(line.decode())["url"] if line else None
        self.port = int(self.url.rpartition(":")[2]) if line else None

    def written(self):
        """The bytes that it has written on stderr so far."""
        with open(self._errors.name, "rb") as file:     # a place of its own: it writes on meanwhile
            return file.read()

    def stop(self, how=signal.SIGTERM):
        """End it; returns (exit code, what it wrote on stderr), also when it is called again."""
        if self._ended:
            return self._ended
        if self.process.poll() is None:
            self.process.send_signal(how)
        code = self.process.wait(20)
        self.process.stdout.close()
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", "replace")
        self._errors.close()
        self._ended = code, text
        return self._ended


def clean_environment(home, **more):
    """An environment for COMMAND, with a home of its own and without anybody's NEXUS_ settings."""
    environ = {name: value for name, value in os.environ.items()
               if not name.startswith("NEXUS_") and name != "PYTHONDONTWRITEBYTECODE"}
    environ.update(HOME=home, USERPROFILE=home, PYTHONPYCACHEPREFIX=CACHE.name,
                   PYTHONPATH=os.pathsep.join(filter(None, (FOLDER, CLUSTER.path))))
    environ.update(more)
    return environ


def make_certificate(folder):
    """(file of a certificate for 127.0.0.1, file of its key), made by openssl."""
    cert, key = (os.path.join(folder, name) for name in ("cert.pem", "key.pem"))
    subprocess.run(("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
                    " -days 2 -subj /CN=nexus -addext subjectAltName=IP:127.0.0.1").split()
                   + ["-keyout", key, "-out", cert], check=True, stderr=subprocess.PIPE)
    return cert, key


Ran = collections.namedtuple("Ran", "code out err json")


def run_nexus(home, *words, input=None, url=None, timeout=60, **environ):
    """Run `nexus.py WORDS` with this home: a Ran, with stdout parsed where it is JSON."""
    if url:
        environ["NEXUS_URL"] = url
    done = subprocess.run(COMMAND + [str(word) for word in words], cwd=home,
                          input=None if input is None else input.encode("utf-8"),
                          stdin=subprocess.DEVNULL if input is None else None,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout,
                          env=clean_environment(home, **environ))
    out, err = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")
    try:
        found = json.loads(out)
    except ValueError:
        found = None
    return Ran(done.returncode, out, err, found)


class Case(unittest.TestCase):
    """A test with temporary folders and servers that are gone at its end."""

    def missing(self, things, sentence):
        """Nothing may be; each thing that is there is said in a sentence of its own."""
        if things:
            self.fail("\n".join([""] + [sentence.replace("%s", each) for each in sorted(things)]))

    def folder(self):
        """A new temporary folder."""
        path = tempfile.mkdtemp(prefix="nexus-test-")
        self.addCleanup(shutil.rmtree, path, True)
        return path

    def server(self, **settings):
        """A server for this test alone."""
        server = Server(**settings)
        self.addCleanup(server.stop)
        return server

    def process(self, *flags, folder=None, **environ):
        """A server process for this test alone."""
        process = Process(folder or self.folder(), *flags, **environ)
        self.addCleanup(process.stop, getattr(signal, "SIGKILL", signal.SIGTERM))
        return process

    def expect(self, answer, status, code=None):
        """The answer has this status and error code; returns its JSON."""
        self.assertEqual((answer.status, (answer.json or {}).get("error")), (status, code),
                         answer.text[:500])
        return answer.json


class ServerCase(Case):
    """A test whose methods share one server, self.s; its settings are the class's SETTINGS."""

    SETTINGS = {}

    @classmethod
    def setUpClass(cls):
        cls.s = Server(**cls.SETTINGS)

    @classmethod
    def tearDownClass(cls):
        cls.s.stop()


# ----------------------------------------------------------------------------------------
# Redaction
#
# What must be caught is caught, in every dress; what must be left alone is left alone; hostile
# input costs linear time. Tokens are put together here, so that no scanner takes this file for a
# leak.
# ----------------------------------------------------------------------------------------

MIX = "a1B2" * 30
HEX = "0a1b2c3d" * 8
AWS = "aB3/" * 10
BEGIN, END, KEY = "-----" + "BEGIN ", "-----" + "END ", "PRIVATE " + "KEY"
LINES = "\n".join([("MIIEow" + MIX)[:64]] * 3)

TOKENS = [
    ("aws-access-key", "AKIA" + "A1B2" * 4), ("aws-access-key", "ASIA" + "Z9Y8" * 4),
    ("aws-access-key", "ABIA" + "Z9Y8" * 4), ("aws-access-key", "ACCA" + "Z9Y8" * 4),
] + [("github-token", prefix + "_" + MIX[:36]) for prefix in ("ghp", "gho", "ghu", "ghr",
    "ghs")] + [
    ("github-token", "ghs_" + MIX * 2 + "." + MIX + "." + MIX),
    ("github-token", "github_" + "pat_" + MIX[:22] + "_" + MIX[:59]),
] + [("gitlab-token", prefix + "-" + MIX[:20])
     for prefix in ("glpat", "gldt", "glrt", "glcbt", "glptt", "glft", "glsoat")] + [
    ("slack-token", kind + "-" + "1234567890-1234567890-" + MIX[:24])
    for kind in ("xoxb", "xoxp", "xoxa", "xoxr", "xoxs")] + [
    ("slack-token", "xoxe-" + "1-" + MIX[:60]),
    ("slack-token", "xapp-" + "1-A1B2-1234567890-" + MIX[:64]),
    ("slack-webhook", "hooks.slack." + "com/services/T1A2B3C4D/B1A2B3C4D/" + MIX[:24]),
    ("discord-webhook", "discord.com/api/" + "webhooks/123456789012345678/" + MIX[:68]),
    ("discord-webhook", "discordapp.com/api/" + "webhooks/123456789012345678/" + MIX[:68]),
    ("discord-token", "MTk4NjIyNDgzNDcxOTI1MjQ4" + ".Cl2FMQ." + MIX[:27]),
    ("telegram-token", "123456789" + ":A" + "Ab1" * 11 + "x"),
    ("anthropic-key", "sk-" + "ant-api03-" + MIX[:93]), ("openai-key", "sk-" + "proj-" + MIX[:80]),
    ("openai-key", "sk-" + "svcacct-" + MIX[:80]), ("openai-key", "sk-" + "admin-" + MIX[:80]),
    ("openai-key", "sk-" + MIX[:20] + "T3Blbk" + "FJ" + MIX[:20]),
    ("openrouter-key", "sk-" + "or-v1-" + HEX), ("google-api-key", "AI" + "za" + MIX[:35]),
    ("google-oauth-token", "ya29" + "." + MIX[:80]), ("huggingface-token", "hf" + "_" + "aBcD" * 9),
    ("groq-key", "gsk" + "_" + MIX[:52]), ("xai-key", "xai" + "-" + MIX[:80]),
    ("perplexity-key", "pplx" + "-" + MIX[:48]), ("replicate-token", "r8" + "_" + MIX[:37]),
    ("nvidia-key", "nvapi" + "-" + MIX[:64]), ("stripe-key", "sk_" + "live_" + MIX[:24]),
    ("stripe-key", "sk_" + "test_" + MIX[:24]), ("stripe-key", "rk_" + "live_" + MIX[:24]),
    ("stripe-key", "rk_" + "test_" + MIX[:99]), ("twilio-key", "SK" + HEX[:32]),
    ("sendgrid-key", "SG" + "." + MIX[:22] + "." + MIX[:43]), ("mailgun-key", "key-" + HEX[:32]),
    ("npm-token", "npm" + "_" + MIX[:36]), ("pypi-token", "pypi-" + "AgEIcHlwaS5vcmc" + MIX),
    ("rubygems-key", "rubygems" + "_" + HEX[:48]), ("docker-token", "dckr_" + "pat_" + MIX[:27]),
    ("digitalocean-token", "dop_" + "v1_" + HEX), ("databricks-token", "dapi" + HEX[:32]),
    ("vault-token", "hvs" + "." + MIX[:90]), ("shopify-token", "shpat" + "_" + HEX[:32]),
    ("shopify-token", "shpss" + "_" + HEX[:32]), ("linear-key", "lin_" + "api_" + MIX[:40]),
    ("notion-token", "ntn" + "_" + MIX[:46]), ("supabase-token", "sbp" + "_" + HEX[:40]),
    ("postman-key", "PMAK" + "-" + HEX[:24] + "-" + HEX[:34]),
    ("doppler-token", "dp" + ".pt." + MIX[:43]), ("tailscale-key", "tskey" + "-auth-" + MIX[:30]),
    ("digitalocean-token", "doo_" + "v1_" + HEX), ("digitalocean-token", "dor_" + "v1_" + HEX),
    ("doppler-token", "dp" + ".ct." + MIX[:43]), ("doppler-token", "dp" + ".sa." + MIX[:43]),
    ("vault-token", "hvb" + "." + MIX[:90]), ("shopify-token", "shpca" + "_" + HEX[:32]),
    ("shopify-token", "shppa" + "_" + HEX[:32]),
    ("grafana-token", "glsa" + "_" + MIX[:32] + "_" + HEX[:8]),
    ("sentry-token", "sntrys" + "_eyJ" + MIX), ("age-key", "AGE-SECRET-" + "KEY-1" + "Q3Z" * 19),
    ("jwt", "ey" + "JhbGciOiJIUzI1NiJ9." + "ey" + "JzdWIiOiIxMjM0In0." + MIX[:43]),
    ("private-key", BEGIN + KEY + "-----\n" + LINES + "\n" + END + KEY + "-----"),
]

# (type, text before the secret, secret, text after it)
SHAPES = [
    ("url-password", "see postgres://app:", "s3cr3t", "@db.example.com:5432/x, please"),
    ("url-password", "postgres://user:", "p@ss:w0rd", "@host/db"),
    ("url-password", "redis://:", "pass", "@host"), ("url-password", "a+b://u:", "x1", "@[::1]"),
    ("auth-header", "Authorization: Bearer ", "xyz", ""),
    ("auth-header", "curl -H 'authorization: Bearer ", MIX[:20], "' https://x.example"),
    ("auth-header", "Authorization: Basic ", "dXNlcjpwYXNz==", "."),
    ("auth-header", '{"Authorization": "Bearer ', "abc.def-1", '"}'),
    ("auth-header", "Proxy-Authorization: Basic ", "dXNlcjpwYXNz", ""),
    ("auth-header", "use bearer ", MIX[:32], " for it"),
    ("password", 'password = "', "hunter2xyz", '"'), ("password", "password=", "hunter2", ""),
    ("password", "password: ", "hunter2", ""), ("password", '{"password":"', "swordfish", '"}'),
    ("password", '{\\"password\\": \\"', "hunter2xyz", '\\"}'),
    ("password", "Password: '", "correct horse battery staple", "' is it"),
    ("password", "db:\n  password: ", "swordfish", "\n  port: 1"),
    ("password", "mysql --password=", "s3cr3t!", " -u root"), ("password", "(password=", "hunter2",
    ")."),
    ("password", "export DB_PASSWORD=", "swordfish", "\n"), ("password", "PGPASSWORD=", "swordfish",
    " psql"),
    ("password", "https://x.example/?user=a&password=", "hunter2", "&x=1"),
    ("password", "Server=x;Password=", "hunter2", ";User=y"), ("password", "passwd: ", "Tr0ub4dor",
    ","),
    ("password", ":password => '", "hunter2", "',"), ("password", "**Password:** ", "hunter2", "."),
    ("password", "pwd=", "1234", ""), ("password", "PASSWORD=", "correct-horse", ""),
    ("api-key", "API_KEY=", "AbCdEfGhIjKl", ""), ("password", 'password="', "HUNTER", '"'),
    ("password", 'password: str = "', "hunter2xyz", '"'),
    ("password", 'config["password"] = "', "say \\\"x1\\\" ", '"'),
    ("secret", "client_secret=", MIX[:16], "&grant=1"), ("secret", "clientSecret: '", MIX[:16],
    "',"),
    ("secret", "SECRET_KEY_BASE=", HEX, ""), ("secret", 'secretKey = "', "abc12345", '"'),
    ("token", "access_token=", MIX[:16], ""), ("token", '"refreshToken": "', "aaaa-bbbb-1", '"'),
    ("token", "os.environ['TOKEN'] = '", "abc12345", "'"), ("token", "token := `", "abc12345", "`"),
    ("api-key", "export API_KEY=", "abc123def", ""), ("api-key", 'apiKey: "', "abc123def", '"'),
    ("api-key", "X-Api-Key: ", "abc123def", "\n"), ("api-key", "api key: ", "abc123def", " ok"),
    ("aws-secret-key", "aws_secret_access_key = ", AWS, ""),
    ("aws-secret-key", "the secret is ", AWS, " for AWS"), ("aws-secret-key", '"', AWS, '" (aws)'),
    ("azure-storage-key", "AccountName=x;Account" + "Key=", "aB3+" * 21 + "aB==",
    ";EndpointSuffix=y"),
    ("private-key", '{"key": "',
    BEGIN + "RSA " + KEY + "-----\\n" + MIX + "\\n" + END + "RSA " + KEY
     + "-----", '\\n"}'),
    ("private-key", "my key:\n", BEGIN + "OPENSSH " + KEY + "-----\n" + LINES, ""),
    ("private-key", "", BEGIN + "PGP " + KEY + " BLOCK-----\n\n" + LINES + "\n" + END + "PGP " + KEY
     + " BLOCK-----", "\nbye"),
    ("private-key", "", BEGIN + "ENCRYPTED " + KEY + "----- " + MIX + " " + END + "ENCRYPTED " + KEY
     + "-----", " bye"),
    ("private-key", "", BEGIN + "EC " + KEY + "-----\r\nProc-Type: 4\r\n\r\n" + MIX + "\r\n" + END
     + "EC " + KEY + "-----", "\r\n"),
]

UNTOUCHED = [
    "ask(prompt='Password: ', stream=None)", 'password = "%s:%s" % (user, word)',
    "$a_token=$entry->{$a_token1}", '"[REDACTED:api-key]": "abc12345"',
    "[REDACTED:token]: abc12345", "", "hello", "é" * 40, "\ud800", "a" * 500, HEX[:40], HEX,
    HEX[:48],
    HEX.upper(),
    "commit " + HEX[:40],
    "550e8400-e29b-41d4-a716-446655440000", "sha256-" + "aB3+" * 10 + "abc=",
    "sha512-" + MIX[:86] + "==",
    "data:image/png;base64,iVBORw0KGgo" + "aB3/SKey" * 90, "msg_" + HEX[:32], "PEARL-FOCAL-S5SJV",
    "task:tx-abc123", "task-" + HEX[:32], "task-proj-" + MIX[:60], "disk-or-v1-" + HEX,
    "risk-ant-" + MIX,
    "AKIA" + "IOSFODNN7EXAMPLE", "AKIA", "AKIA" + "A1B2" * 6, "xAKIA" + "A1B2" * 4, "ghp_short",
    "gh" + "p_" + "x" * 36,
    "sk-****", "sk-ant-...", "hf_model_name_of_a_longer_kind", "cache-key-" + HEX[:32],
    "desk" + HEX[:32],
    "pk_" + "live_" + MIX[:24], "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI" + MIX[:43] + " anna@host",
    BEGIN + "PUBLIC KEY-----\n" + LINES + "\n" + END + "PUBLIC KEY-----",
    BEGIN + "CERTIFICATE-----\n" + LINES, "grep '" + BEGIN + KEY + "-----' *.pem and mail me",
    "http://host:8080/@user/x", "https://medium.com/@anna/a:b@c", "http://[::1]:80/@x",
    "mailto:a@b.c",
    "https://anna@example.com/", "ssh://git@host:22/x", "oci://app:tag@sha256:" + HEX,
    "a://u:${PASS}@h",
    "a://u:<password>@h", "a://u:{{pw}}@h", "a://u:****@h", "12:30", "http://a:80/?x=@",
    "Authorization: Bearer $TOKEN", "Authorization: Bearer ${TOKEN}",
    "Authorization: Bearer <token>",
    "Authorization: Bearer YOUR_TOKEN", 'f"Authorization: Bearer {token}"',
    "Authorization: Bearer token",
    "Authorization is required", "bearer of bad news", "Basic authentication",
    "bearer tokens-are-not-this-one",
    "password = ${VAR}", "password=$TOKEN", "password: {{ x }}", "password=<token>", "token=xxxx",
    "password=xxxxxxxx", "password: ********", "password = None", "password: null",
    '"password": "null"',
    "password=true", "password: false", "password: str", "token: str, x",
    "token: Optional[str] = None",
    "token: string;", "token = get_token()", 'token = os.environ["TOKEN1"]', "token: process.env.X",
    'password = os.environ.get("PASSWORD1")', "password == 'hunter2'", "password != 'hunter2'",
    "if token === 'abc12345'", "password >= 12345678", "the password: required field",
    "password is required",
    "password: required", "MAX_TOKENS=100", "max_tokens: 100000", "tokenizer=abc12345",
    "tokens: 1234567",
    "secretary: Anna1234", "monkey=abc12345", "keyboard: qwerty123", "primary_key=abc12345",
    "key: abc12345",
    "token_url=abc12345", "passwordless: abc12345", "token_count = 1234567",
    "cost per token: 0.0015",
    "secret: [a, b]", "password: |", "f(password=password)", "f(token=token, x=1)",
    "f(password=word)",
    "self.password = db_password", "password = user.password", "token = self.token2",
    "secret = sha256(x)",
    "password: sha256", "password: 8-64 characters", "password: SecretStr", "password: 2024 rules",
    "my-secret:v1.2.3", "token:read", "password_file=/run/secrets/db1", "password: /run/secrets/db",
    "api_key: YOUR_API_KEY", "api_key='your-api-key'", "api_key=...",
    'url + "?token=" + token1 + "&x=1"',
    "next_page_token=abc12345", '"nextPageToken": "abc12345"', 'eos_token = "<|end1|>"',
    "token: https://a.b/c1",
    '{"password": "must have at least 8 characters"}', '{"token": "hello"}',
    '<input type="password" name="x1">',
    "WHERE password = :password1", "password = %(password)s", "token = token2",
    "std::token::abc12345",
    "public_key=abc12345", "publishable_key: abc12345", "aws deploys " + HEX[:40],
    "nothing near " + AWS, "password=[REDACTED:password]", "see [REDACTED:github-token] and more",
    "https://u:[REDACTED:url-password]@h", "Authorization: Bearer [REDACTED:auth-header]",
    "[REDACTED:secret] " + AWS, '"token": "[REDACTED:jwt]"', "key:[REDACTED:hunter2]",
]


def frames(token):
    """The same token as agents write it: text around it must survive."""
    mark = "%s"
    return [mark, '"%s"', "'%s'", "`%s`", "(%s)", "it is %s, ok", "it is %s.", "a\n%s\nb", "x=%s",
        "x:%s;",
            "[%s](y)", "<%s>", "*%s*", "是%s是", "line\\n%s\\n"]


class RedactTest(Case):
    def check(self, text, expected, kind):
        result = nexus.redact(text)
        self.assertEqual(result, (expected, [kind]))
        self.assertEqual(nexus.redact(result[0]), (result[0], []))

    def test_tokens_in_every_frame(self):
        for kind, token in TOKENS:
            for frame in frames(token):
                with self.subTest(kind=kind, frame=frame):
                    self.check(frame.replace("%s", token), frame.replace("%s",
                        "[REDACTED:%s]" % kind), kind)

    def test_every_rule_has_an_example(self):
        tried = [token for _, token in TOKENS]
        self.missing([token for token in tried if len(token) < len(nexus._TOKEN_RUN)],
                     "%s is shorter than the 20 characters in a row without which a text is not"
                     " looked at: its rule belongs to _SHAPES.")
        self.missing([needle for rule in nexus._TOKENS for needle in rule.needles.split()
                      if not any(needle in token for token in tried)],
                     "No example begins with %s: add one to TOKENS.")
        tried = [(before + secret + after).lower() for _, before, secret, after in SHAPES] + tried
        self.missing([needle for rule in nexus._SHAPES for needle in rule.needles.split()
                      if not any(needle in text.lower() for text in tried)],
                     "No example holds %s: add one to SHAPES.")

    def test_shapes_replace_the_secret_alone(self):
        for kind, before, secret, after in SHAPES:
            with self.subTest(kind=kind, before=before):
                self.check(before + secret + after, before + "[REDACTED:%s]" % kind + after, kind)

    def test_look_alikes_stay(self):
        for text in UNTOUCHED:
            with self.subTest(text=text):
                self.assertEqual(nexus.redact(text), (text, []))
                value = {"a": [text], "b " + text: 1}
                self.assertIs(nexus.redact_json(value)[0], value)

    def test_a_private_key_goes_whole_whatever_its_first_bytes_look_like(self):
        parts = BEGIN + KEY + "-----", "AKIA" + "Q3Z7" * 4, MIX, END + KEY + "-----"
        for gap in ("", "\n", "\\n"):
            self.check(gap.join(parts), "[REDACTED:private-key]", "private-key")

    def test_types_are_sorted_and_unique(self):
        text = " ".join(token for _, token in reversed(TOKENS))
        self.assertEqual(nexus.redact(text)[1], sorted({kind for kind, _ in TOKENS}))

    def test_session_keys_are_told_from_other_hex(self):
        mine, other = HEX, HEX[::-1]
        asked = []
        text, types = nexus.redact("%s X-Session-Key: %s, %%20%s a%s" % (
            mine.upper(), other, mine, mine),
                             lambda key: asked.append(key) or key == mine)
        self.assertEqual(text,
            "[REDACTED:session-key] X-Session-Key: %s, %%20[REDACTED:session-key] a%s"
                         % (other, mine))
        self.assertEqual((types, asked), (["session-key"], [mine, other, mine]))

    def test_any_text_is_stable_under_a_second_reading(self):
        pick = random.Random(7)
        parts = ([token for _, token in TOKENS] + [b + s + a for _, b, s, a in SHAPES] + UNTOUCHED
                 + list(' \n:=,."\'\\@/-[]') + ["password", "secret", "aws", "token: ", AWS])
        for _ in range(3000):
            text = "".join(pick.choice(parts) + pick.choice(("",
                " ")) for _ in range(pick.randint(1, 6)))
            once = nexus.redact(text)[0]
            self.assertEqual(nexus.redact(once), (once, []), text)


class RedactJsonTest(unittest.TestCase):
    def test_tokens_in_values_and_keys(self):
        for kind, token in TOKENS:
            marker = "[REDACTED:%s]" % kind
            with self.subTest(kind=kind):
                self.assertEqual(nexus.redact_json({"a": [1, {"b": "x " + token}]}),
                                 ({"a": [1, {"b": "x " + marker}]}, [kind]))
                self.assertEqual(nexus.redact_json({token: None}), ({marker: None}, [kind]))
                text = json.dumps({"a": token})
                self.assertEqual(nexus.redact(text)[0], json.dumps({"a": marker}))

    def test_a_key_that_names_a_secret(self):
        for key, value, kind in [
                ("password", "hunter2xyz", "password"), ("api_key", "abc123def", "api-key"),
                ("apiKey", "abc123def", "api-key"), ("x-api-key", "abc123def", "api-key"),
                ("clientSecret", "abc123def", "secret"), ("access_token", "abc123def", "token"),
                ("DB_PASSWORD", "swordfish", "password"), ("password2", 'x"b\nc d', "password"),
                ("aws_secret_access_key", AWS, "aws-secret-key"),
                ("SecretAccessKey", AWS, "aws-secret-key")]:
            with self.subTest(key=key):
                safe = {key: "[REDACTED:%s]" % kind}
                self.assertEqual(nexus.redact_json({key: value}), (safe, [kind]))
                self.assertEqual(nexus.redact_json({key: [value]}),
                                 ({key: list(safe.values())}, [kind]))
                self.assertIs(nexus.redact_json(safe)[0], safe)
        self.assertEqual(nexus.redact_json({"Authorization": "Bearer xyz"}),
                         ({"Authorization": "Bearer [REDACTED:auth-header]"}, ["auth-header"]))

    def test_nothing_found_is_the_same_object(self):
        for value in [None, 1, 1.5, True, "text", [], {}, {"password": None, "token": 5,
            "secret": ""},
                      {"password": "${PASS}", "token": "<token>", "api_key": "YOUR_API_KEY"},
                      {"password": "Password is required", "pwd": "/srv/app", "token": "hello"},
                      {"max_tokens": "abc12345", "tokenUrl": "abc12345", "key": "abc12345"}]:
            with self.subTest(value=value):
                self.assertEqual(nexus.redact_json(value), (value, []))
                self.assertIs(nexus.redact_json(value)[0], value)

    def test_the_value_that_was_given_and_its_order_are_kept(self):
        value = {"z": {"deep": [1]}, "password": "hunter2xyz", "a": 1}
        safe, _ = nexus.redact_json(value)
        self.assertEqual(safe["z"], value["z"])
        self.assertEqual(list(safe), ["z", "password", "a"])
        self.assertEqual(value["password"], "hunter2xyz")

    def test_two_keys_never_become_one(self):
        one, two = "gh" + "p_" + MIX[:36], "gh" + "p_" + MIX[1:37]
        marker = "[REDACTED:github-token]"
        safe, _ = nexus.redact_json({one: 1, two: 2, marker: 3})
        self.assertEqual(safe, {marker + "-2": 1, marker + "-3": 2, marker: 3})
        self.assertIs(nexus.redact_json(safe)[0], safe)

    def test_many_keys_that_come_out_the_same_cost_linear_time(self):
        value = {"gh" + "p_%036d" % number: number for number in range(20000)}
        safe, _ = nexus.redact_json(value)  # quadratic: a minute
        self.assertEqual(list(safe.values()), list(value.values()))

    def test_session_keys_inside(self):
        self.assertEqual(nexus.redact_json([HEX, {HEX: HEX}], HEX.__eq__),
                         (["[REDACTED:session-key]",
                         {"[REDACTED:session-key]": "[REDACTED:session-key]"}],
                          ["session-key"]))

    def test_depth(self):
        value = "password=hunter2"
        for _ in range(200):
            value = [{"a": value}]
        self.assertEqual(nexus.redact_json(value)[1], ["password"])


class LinearTest(unittest.TestCase):
    """Twice the input takes about twice the time, whatever it is: no quadratic retries."""
    UNITS = ["a", ":", "/", "\\", "1", "=", '"', "-", ".", "sk-", "eyJ", "eyJaaaaaaaaaa.",
        "-eyJaaaaaaaaaa",
             BEGIN, BEGIN + KEY + "-----\n", BEGIN + KEY, "password=", 'password: "',
                 "password='a\"",
             'password=\\"a', "password: a ", "password: abcdefgh\n", "password=" + ":" * 4090,
             "password=" + "/a" * 900, "password=" + "a." * 900, "https://", "//a:", "://a:",
             "://:@",
             "://a:" + "b" * 290, HEX, HEX + " ", "aws ", "aws " + AWS + "x ", "secret ", "bearer ",
             "bearer " + "a" * 70, "authorization: bearer ", "Authorization=bearer " + "." * 900,
             "123456789:A", "1:a", "Account" + "Key=", "M1" * 12 + ".", "M1-",
             "SG." + "a" * 16 + "-",
             "token: a[", "password=a(", "x" * 9 + "=", "password :" + "\t" * 9, "é", "\n"]

    @staticmethod
    def cost(text):
        start = time.thread_time()      # of this thread: others may be busy as they like
        nexus.redact(text, lambda key: False)
        return time.thread_time() - start

    def test_hostile_input(self):
        everything = " ".join(token[:9] for _,
            token in TOKENS) + " ".join(s[1][-9:] for s in SHAPES)
        for unit in self.UNITS + [everything, everything.replace(" ", "")]:
            short = (unit * 16384)[:16384]
            for attempt in range(5):    # the best of as many as it takes
                # Quadratic work takes 16 times as long; 0.02 is more than a tick on Windows.
                if self.cost(short * 4) < 9 * self.cost(short) + 0.02:
                    break
            else:
                self.fail("not in linear time: %r" % unit[:20])


# ----------------------------------------------------------------------------------------
# Door 1: tools
#
# Nothing here sleeps for long: tests wait for a moment, make calls on the side, replace a name
# for a while, and read raw HTTP. What a call answers is compared as a whole set of names.
# ----------------------------------------------------------------------------------------

TOKEN = "ghp_" + "a1B2" * 9             # put together here, so that no scanner takes us for a leak
UNKNOWN = "0" * 48                      # a session id that was never given out
LOST = "AMBER-AMBER-00000"              # a pairing code that was never given out


@contextlib.contextmanager
def one_commit(db):
    """What is written meanwhile goes into one commit, at the end; yields queued(count)."""
    begun, end = threading.Event(), threading.Event()

    def hold(_):
        begun.set()
        end.wait(20)
    leader = Started(db.write, hold)
    begun.wait(10)
    try:
        yield lambda count: until(lambda: len(db._queue) == count)
    finally:
        end.set()
        leader.result()


def names(text):
    """The names in a text, for comparing with an answer's."""
    return set(text.split())


def when(text):
    """Milliseconds since 1970 of a time on the wire, which must be spelled as promised."""
    second, rest = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(\d{3})Z", text).groups()
    parts = time.strptime(second, "%Y-%m-%dT%H:%M:%S")[:8] + (0,)
    return int(time.mktime(parts) - time.timezone) * 1000 + int(rest)


def texts(answer):
    """The texts of a poll's messages."""
    return [message["text"] for message in answer.json["messages"]]


def get(path, *lines):
    """The bytes of a GET with these header lines."""
    return "\r\n".join(("GET %s HTTP/1.1" % path, "Host: localhost") + lines + ("", "")).encode()


def answers(raw):
    """The HTTP answers in some bytes, one after the other, as a list of Answer."""
    found = []
    while raw:
        head, _, raw = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        length = int(headers.get("content-length", 0))
        text, raw = raw[:length].decode(), raw[length:]
        found.append(Answer(int(first.split()[1]), headers, json.loads(text or "null"), text))
    return found


class Door1Case(ServerCase):
    """Each test has a session of its own, self.sid, with ada (its creator) and bob."""

    def setUp(self):
        self.sid, self.keys = self.s.session(("ada", "bob"), ttl=100)
        self.path = "/v1/sessions/" + self.sid
        self.posts = self.path + "/messages"

    def refuse(self, *rows):
        """Make calls that are refused: (method, path, body, agent, key, status, code)."""
        for *call, status, code in rows:
            self.expect(self.s.call(*call), status, code)

    def faults(self, answer):
        """The names of the fields that the answer complains about."""
        return [row["field"] for row in self.expect(answer, 400, "invalid_request")["details"]]

    def last(self):
        return self.s.poll(self.sid, "bob").json["messages"][-1]

    def parked(self, count):
        until(lambda: self.s.store.waiters.parked == count)


# ----------------------------------------------------------------------------------------
# Door 1: the calls
#
# Each call of the contract answers with its status and exactly its fields, each refusal with its
# code; faults are listed all at once.
# ----------------------------------------------------------------------------------------

class SessionTest(Door1Case):

    def test_create_has_defaults_and_answers_what_it_was_given(self):
        plain = names("sessionId ttl maxAgents state createdAt expiresAt")
        for headers in ({}, {"Content-Type": "application/json"}):
            found = self.expect(self.s.call("PUT", "/v1/sessions", headers=headers), 201)
            self.assertEqual(set(found), plain)
            self.assertEqual((found["ttl"], found["maxAgents"], found["state"]),
                             (3660, 50, "active"))
            self.assertRegex(found["sessionId"], r"\A[0-9a-f]{48}\Z")
            self.assertEqual(when(found["expiresAt"]) - when(found["createdAt"]), 3660000)
        given = {"ttl": 60, "maxAgents": 3, "greeting": "Hi", "creatorAgentId": "ada"}
        found = self.expect(self.s.call("PUT", "/v1/sessions", given), 201)
        self.assertEqual(set(found), plain | set(given) | {"sessionKey"})
        self.assertEqual({name: found[name] for name in given}, given)
        self.assertRegex(found["sessionKey"], r"\A[0-9a-f]{64}\Z")

    def test_create_takes_its_bounds_and_nothing_beyond(self):
        for body in ({"ttl": 1}, {"ttl": 86400}, {"ttl": 60.0}, {"maxAgents": 1}, {"unknown": 1},
                     {"maxAgents": 50}, {"creatorAgentId": "a" * 128}):
            self.expect(self.s.call("PUT", "/v1/sessions", body), 201)
        for body in ({"ttl": 0}, {"ttl": 86401}, {"ttl": "60"}, {"ttl": 1.5}, {"ttl": True},
                     {"ttl": None}, {"maxAgents": 0}, {"maxAgents": 51}, {"greeting": 1},
                     {"creatorAgentId": ""}, {"creatorAgentId": "a" * 129},
                     {"creatorAgentId": "a b"}, {"creatorAgentId": "system"}):
            self.assertEqual(self.faults(self.s.call("PUT", "/v1/sessions", body)), list(body))

    def test_details_list_all_faults_at_once(self):
        body = {"ttl": -1, "maxAgents": "x", "greeting": [], "creatorAgentId": "é"}
        answer = self.s.call("PUT", "/v1/sessions", body)
        self.assertEqual(self.faults(answer), list(body))
        self.assertEqual(set(answer.json), names("error message details"))
        self.assertEqual({frozenset(row) for row in answer.json["details"]},
                         {frozenset(("field", "message"))})
        answer = self.s.poll(self.sid, "a b", "?after=-1&limit=0&wait=61")
        self.assertEqual(set(self.faults(answer)), names("X-Agent-Id after limit wait"))
        answer = self.s.call("POST", self.posts, {"text": 5, "json": None}, "ada")
        self.assertEqual(self.faults(answer), ["text", "json"])

    def test_status_tells_who_is_in_and_until_when(self):
        found = self.expect(self.s.call("GET", self.path), 200)
        self.assertEqual(set(found), names("sessionId state agents ttl maxAgents creatorAgentId"
                                           " createdAt expiresAt"))
        self.assertEqual((found["agents"], found["creatorAgentId"], found["ttl"]),
                         (["ada", "bob"], "ada", 100))
        sid = self.s.call("PUT", "/v1/sessions").json["sessionId"]
        self.assertIsNone(self.s.call("GET", "/v1/sessions/" + sid).json["creatorAgentId"])

    def test_join_gives_a_key_and_with_it_is_harmless_again(self):
        join = self.path + "/join"
        found = self.expect(self.s.call("POST", join, agent="eve"), 200)
        self.assertEqual(set(found), names("status sessionId agentsOnline sessionKey expiresAt"))
        self.assertEqual((found["status"], found["agentsOnline"]), ("joined", 3))
        self.assertNotIn(found["sessionKey"], self.keys.values())
        self.refuse(("POST", join, None, "bob", None, 409, "agent_id_taken"),
                    ("POST", join, None, "bob", self.keys["ada"], 409, "agent_id_taken"),
                    ("POST", join, None, "system", None, 400, "invalid_request"))
        again = self.expect(self.s.call("POST", join, agent="bob", key=self.keys["bob"]), 200)
        self.assertEqual((again["sessionKey"], again["agentsOnline"]), (self.keys["bob"], 3))

    def test_a_full_session_takes_nobody_until_somebody_leaves(self):
        sid, keys = self.s.session(("ada", "bob"), maxAgents=2)
        path, bob = "/v1/sessions/" + sid, keys["bob"]
        self.refuse(("POST", path + "/join", None, "eve", None, 409, "session_full"))
        self.expect(self.s.call("POST", path + "/join", agent="bob", key=bob), 200)
        self.expect(self.s.call("DELETE", path + "/agents/bob", agent="bob", key=bob), 200)
        self.expect(self.s.call("POST", path + "/join", agent="eve"), 200)

    def test_leave_removes_the_agent_itself_and_only_with_its_key(self):
        leave, bob, ada = self.path + "/agents/", self.keys["bob"], self.keys["ada"]
        self.refuse(
            ("DELETE", leave + "bob", None, None, bob, 400, "missing_agent_id"),
            ("DELETE", leave + "bob", None, "bob", None, 401, "missing_session_key"),
            ("DELETE", leave + "bob", None, "bob", ada, 401, "invalid_session_key"),
            ("DELETE", leave + "bob", None, "ada", ada, 403, "forbidden"),
            ("DELETE", leave + "ada", None, "ada", ada, 403, "forbidden"),
            ("DELETE", leave + "eve", None, "eve", bob, 404, "agent_not_found"))
        found = self.expect(self.s.call("DELETE", leave + "bob", agent="bob", key=bob), 200)
        self.assertEqual(set(found), names("ok sessionId agentId message"))
        self.assertEqual((found["ok"], found["agentId"]), (True, "bob"))
        self.assertEqual(self.s.call("GET", self.path).json["agents"], ["ada"])
        self.expect(self.s.poll(self.sid, "bob"), 403, "forbidden")

    def test_renew_restarts_the_clock_and_may_change_the_ttl(self):
        renew = self.path + "/renew"
        self.s.clock.advance(60)
        found = self.expect(self.s.call("POST", renew, agent="bob"), 200)
        self.assertEqual(set(found), names("sessionId state ttl expiresAt agents"))
        self.assertEqual((found["ttl"], found["agents"]), (100, ["ada", "bob"]))
        found = self.s.call("POST", renew, {"ttl": 500}, agent="bob").json
        self.assertEqual(when(found["expiresAt"]), self.s.clock.now() + 500000)
        self.s.clock.advance(400)
        self.assertEqual(self.s.call("GET", self.path).json["expiresAt"], found["expiresAt"])
        self.refuse(("POST", renew, {"ttl": 0}, "bob", None, 400, "invalid_request"),
                    ("POST", renew, None, "eve", None, 403, "forbidden"))

    def test_every_call_refuses_an_unknown_session_and_an_agent_without_a_name(self):
        path = "/v1/sessions/" + UNKNOWN
        for method, rest, body in (
                ("POST", "/join", None), ("POST", "/renew", {}), ("GET", "/messages", None),
                ("POST", "/messages", {"text": "x"}), ("DELETE", "/agents/ada", None)):
            self.refuse((method, path + rest, body, "ada", "0" * 64, 404, "session_not_found"),
                        (method, self.path + rest, body, None, None, 400, "missing_agent_id"))
        self.refuse(("GET", path, None, None, None, 404, "session_not_found"), (
            "PUT", "/v1/pair", {"sessionId": UNKNOWN}, None, None, 404, "session_not_found"))

    def test_health_stats_metrics_and_openapi_answer(self):
        found = self.expect(self.s.call("GET", "/health"), 200)
        self.assertEqual(set(found), names("status version uptime engine capabilities"))
        self.assertEqual((found["status"], found["capabilities"], type(found["uptime"])),
                         ("healthy", {"messageFormat": ["text", "json"]}, int))
        stats = self.expect(self.s.call("GET", "/v1/stats"), 200)
        self.s.session(("ada", "bob"), greeting="Hello")
        more = self.s.call("GET", "/v1/stats").json
        self.assertEqual([more[name] - stats[name] for name in (
            "activeSessions", "totalAgents", "totalMessages")], [1, 2, 1])
        self.assertIsInstance(more["uptime"], int)
        for line in ("# TYPE nexus_active_sessions gauge\nnexus_active_sessions %d\n"
                     % more["activeSessions"], "# TYPE nexus_requests counter\n"):
            self.assertIn(line, self.s.call("GET", "/metrics").text)
        paths = self.expect(self.s.call("GET", "/openapi.json"), 200)["paths"]
        self.assertLessEqual({"/v1/sessions/{sessionId}/messages", "/v1/pair/{code}/claim",
                              "/p/{code}", "/health", "/api/messages"}, set(paths))


class MessageTest(Door1Case):

    def test_send_answers_with_id_and_cursor(self):
        found = self.expect(self.s.send(self.sid, "ada", "one", self.keys["ada"]), 201)
        self.assertEqual(set(found), names("ok id cursor expiresAt"))
        self.assertEqual((found["ok"], found["cursor"]), (True, "1"))
        self.assertRegex(found["id"], r"\Amsg_\w+\Z")
        self.assertEqual(when(found["expiresAt"]), self.s.clock.now() + 100000)

    def test_text_is_always_there_and_json_only_when_sent(self):
        for body in ({"text": "a"}, {"json": {"n": [1, None]}}, {"text": "b", "json": 0},
                     {"json": False}, {"text": "", "json": ""}, {"text": "\0 \U0001f600 \u2028"}):
            self.expect(self.s.call("POST", self.posts, body, "ada"), 201)
            message = self.last()
            self.assertEqual(set(message), names("id agentId text cursor verified createdAt"
                                                 " expiresAt") | ({"json"} & set(body)))
            self.assertEqual((message["text"], message.get("json")),
                             (body.get("text", ""), body.get("json")))
            self.assertEqual(when(message["expiresAt"]) - when(message["createdAt"]), 100000)

    def test_what_is_refused_is_not_stored(self):
        for body in ({}, {"text": ""}, {"text": 5}, {"text": None}, {"text": "a", "json": None}):
            self.assertEqual(len(self.faults(self.s.call("POST", self.posts, body, "ada"))), 1)
        for key in (self.keys["bob"], "0" * 64, "short", "é"):
            self.expect(self.s.send(self.sid, "ada", "x", key), 403, "invalid_session_key")
        for answer in (self.s.send(self.sid, "eve", "x"), self.s.poll(self.sid, "eve")):
            self.assertIn("not in session", self.expect(answer, 403, "forbidden")["message"])
        self.expect(self.s.call("POST", self.posts, {"text": "x"}, "ada",
                                headers={"Idempotency-Key": ""}), 400, "invalid_request")
        self.assertEqual(self.s.send(self.sid, "ada", "first").json["cursor"], "1")
        self.assertEqual(self.s.send(self.sid, "ada", "x", "").json["cursor"], "2")  # as if no key

    def test_a_message_is_verified_by_its_senders_key(self):
        for key, verified in ((self.keys["ada"], True), (None, False)):
            self.s.send(self.sid, "ada", "x", key)
            self.assertIs(self.last()["verified"], verified)

    def test_cursors_start_at_the_greeting_and_have_no_gaps(self):
        sid, _ = self.s.session(greeting="Hello")
        found = self.s.poll(sid, "ada").json
        self.assertEqual(set(found), names("messages nextCursor more"))
        self.assertEqual(set(found["messages"][0]), names(
            "id agentId text cursor verified createdAt expiresAt"))
        self.assertEqual([found["messages"][0][name] for name in ("agentId", "text", "cursor")],
                         ["system", "Hello", "0"])
        self.assertEqual(found["messages"][0]["expiresAt"],     # it lives with its session
                         self.s.call("GET", "/v1/sessions/" + sid).json["expiresAt"])
        self.assertEqual([self.s.send(sid, "ada", str(n)).json["cursor"] for n in (1, 2, 3)],
                         ["1", "2", "3"])
        for query, found, following in (
                ("", ["Hello", "1", "2", "3"], "3"), ("?after=0", ["1", "2", "3"], "3"),
                ("?after=2", ["3"], "3"), ("?after=3", [], "3"), ("?after=77", [], "77"),
                ("?limit=2", ["Hello", "1"], "1"), ("?after=1&limit=1", ["2"], "2"),
                ("?limit=1&after=9", [], "9"),
                ("?limit=1000&wait=0&members=false&unknown=1", ["Hello", "1", "2", "3"], "3")):
            answer = self.s.poll(sid, "ada", query)
            self.assertEqual((texts(answer), answer.json["nextCursor"]), (found, following), query)
        self.assertEqual(self.s.poll(self.sid, "ada").json,
                         {"messages": [], "nextCursor": "0", "more": False})

    def test_concurrent_sends_get_every_cursor_once(self):
        calls = [Started(self.s.send, self.sid, "ada", str(n)) for n in range(20)]
        sent = {int(call.result().json["cursor"]): str(n) for n, call in enumerate(calls)}
        self.assertEqual(texts(self.s.poll(self.sid, "bob")), [sent[n] for n in range(1, 21)])

    def test_members_tells_when_each_was_last_seen(self):
        seen = []
        for _ in range(2):
            self.s.clock.advance(20)
            found = self.s.poll(self.sid, "bob", "?members=true").json["members"]
            self.assertEqual([set(member) for member in found], [names("agentId lastSeenAt")] * 2)
            seen.append({member["agentId"]: when(member["lastSeenAt"]) for member in found})
            self.s.send(self.sid, "ada", "x")
        self.assertGreaterEqual(seen[0]["bob"] - seen[0]["ada"], 20000)
        self.assertGreaterEqual(seen[1]["ada"] - seen[0]["ada"], 20000)

    def test_wait_sleeps_over_seen_messages_and_wakes_on_a_new_one(self):
        for text in ("one", "two"):
            self.s.send(self.sid, "ada", text)
        self.assertEqual(texts(self.s.poll(self.sid, "bob", "?after=1&wait=60")), ["two"])
        waiting = [Started(self.s.poll, self.sid, agent, "?after=2&wait=60")
                   for agent in ("ada", "bob") * 3]
        self.parked(6)
        self.s.send(self.s.session()[0], "ada", "in another session")
        began = time.monotonic()
        self.s.send(self.sid, "ada", "three")
        self.assertEqual([texts(each.result()) for each in waiting], [["three"]] * 6)
        self.assertLess(time.monotonic() - began, 5)
        self.parked(0)

    def test_wait_ends_with_an_empty_list(self):
        began = time.monotonic()
        found = self.s.store.sessions.poll(self.sid, "bob", 5, 10, 0.1, False, None)
        self.assertEqual(found, {"messages": [], "nextCursor": "5", "more": False})
        self.assertGreaterEqual(time.monotonic() - began, 0.09)

    def test_a_client_that_hangs_up_frees_its_place(self):
        for half in (False, True):
            with socket.create_connection(("127.0.0.1", self.s.port)) as sock:
                sock.sendall(get(self.posts + "?wait=60", "X-Agent-Id: bob"))
                self.parked(1)
                if half:
                    sock.shutdown(socket.SHUT_WR)
                    self.parked(0)
            self.parked(0)

    def test_stop_sends_waiters_home_with_an_empty_answer(self):
        server = self.server()
        sid, _ = server.session()
        waiting = Started(server.poll, sid, "ada", "?after=3&wait=60")
        until(lambda: server.store.waiters.parked)
        server.stop()
        self.assertEqual(waiting.result().json,
                         {"messages": [], "nextCursor": "3", "more": False})

    def test_stop_waits_for_an_answer_under_way_but_not_for_ever(self):
        server, end = self.server(), threading.Event()
        self.addCleanup(end.set)
        with patched(server.store.sessions, "status", lambda *_: end.wait(30)):
            stuck = Started(server.call, "GET", "/v1/sessions/x")
            until(lambda: server.app.requests)
            Started(server.stop, 0.05).result()
        end.set()
        with contextlib.suppress(OSError, http.client.HTTPException):   # it may be cut off
            stuck.result()

    def test_places_to_wait_are_limited_in_all_and_per_address(self):
        server = self.server(max_waiters=2, max_waiters_per_address=1, trust_proxy=True)
        sid, _ = server.session()

        def poll(address, query="?wait=60"):
            return server.call("GET", "/v1/sessions/%s/messages%s" % (sid, query), agent="ada",
                               headers={"X-Forwarded-For": address})
        waiting = []
        for address, refused in (("203.0.113.1", "203.0.113.1"), ("203.0.113.2", "203.0.113.3")):
            waiting.append(Started(poll, address))
            until(lambda: server.store.waiters.parked == len(waiting))
            answer = poll(refused)
            self.expect(answer, 503, "server_busy")
            self.assertGreater(int(answer.headers["retry-after"]), 0)
        for number in ("1", "2"):           # who was answered has its place again
            server.send(sid, "ada", number)
            self.assertEqual([each.result().json["nextCursor"] for each in waiting], [number] * 2)
            waiting = [Started(poll, "203.0.113.%s" % n, "?after=%s&wait=60" % number)
                       for n in "12"]
            until(lambda: server.store.waiters.parked == 2)


# ----------------------------------------------------------------------------------------
# Door 1: lifetimes
#
# A session slides with its use and is gone the moment its time is over, for every call; the
# sweep removes it, and nothing of it stays.
# ----------------------------------------------------------------------------------------

class LifetimeTest(Case):

    def setUp(self):
        self.s = self.server()

    def rows(self):
        """How many sessions, agents, messages and codes are stored."""
        return tuple(self.s.store.db.read("SELECT COUNT(*) FROM " + table)[0][0]
                     for table in ("sessions", "agents", "session_messages", "codes"))

    def test_sending_and_polling_keep_a_session_alive(self):
        sid, _ = self.s.session(ttl=100)
        for act in (lambda: self.s.poll(sid, "ada"), lambda: self.s.send(sid, "ada", "x")) * 2:
            self.s.clock.advance(60)
            self.assertLess(act().status, 300)
            ends = when(self.s.call("GET", "/v1/sessions/" + sid).json["expiresAt"])
            self.assertEqual(ends, self.s.clock.now() + 100000)
            self.s.sweep()
        self.s.clock.advance(60)
        self.expect(self.s.call("GET", "/v1/sessions/" + sid), 200)
        self.s.clock.advance(41)        # looking at the status was no activity
        self.expect(self.s.call("GET", "/v1/sessions/" + sid), 404, "session_not_found")

    def test_a_message_lives_for_the_ttl_from_its_sending(self):
        sid, _ = self.s.session(ttl=100, greeting="Hello")
        for text in ("one", "two"):
            self.s.send(sid, "ada", text)
            self.s.clock.advance(60)
        self.assertEqual(texts(self.s.poll(sid, "ada")), ["Hello", "two"])
        self.s.clock.advance(60)
        self.assertEqual(self.s.poll(sid, "ada", "?after=0").json,
                         {"messages": [], "nextCursor": "0", "more": False})
        self.assertEqual(self.s.send(sid, "ada", "three").json["cursor"], "3")

    def test_what_is_over_is_invisible_at_once_and_deleted_by_the_sweep(self):
        sid, keys = self.s.session(("ada", "bob"), ttl=10, greeting="Hello")
        code = self.s.call("PUT", "/v1/pair", {"sessionId": sid}).json["code"]
        self.s.send(sid, "ada", "x")
        self.assertEqual(self.rows(), (1, 2, 2, 1))
        self.s.clock.advance(11)
        for answer in (self.s.poll(sid, "ada"), self.s.send(sid, "ada", "y", keys["ada"]),
                       self.s.call("POST", "/v1/sessions/%s/renew" % sid, agent="ada"),
                       self.s.call("POST", "/v1/sessions/%s/join" % sid, agent="eve")):
            self.expect(answer, 404, "session_not_found")
        self.assertEqual(self.s.call("GET", "/v1/stats").json["activeSessions"], 0)
        self.assertEqual(self.s.call("GET", "/v1/pair/%s/status" % code).json["state"], "expired")
        self.assertEqual((self.s.sweep(), self.rows()), (3, (0, 0, 0, 1)))
        self.s.clock.advance(nexus.CODE_SECONDS + nexus.CODE_MEMORY_SECONDS)
        self.assertEqual((self.s.sweep(), self.rows()), (1, (0, 0, 0, 0)))

    def test_the_silent_are_removed_but_never_the_creator(self):
        server = self.server(agent_inactivity=30)
        sid, keys = server.session(("ada", "bob", "eve"), ttl=1000)
        server.clock.advance(20)
        server.poll(sid, "eve")
        server.clock.advance(20)
        server.sweep()
        self.assertEqual(server.call("GET", "/v1/sessions/" + sid).json["agents"], ["ada", "eve"])
        self.expect(server.send(sid, "bob", "x", keys["bob"]), 403, "forbidden")
        self.expect(server.call("POST", "/v1/sessions/%s/join" % sid, agent="bob"), 200)

    @unittest.skipUnless(hasattr(time, "CLOCK_BOOTTIME"), "this system stops counting in its sleep")
    def test_the_clock_goes_on_while_the_computer_sleeps(self):
        with patched(time, "clock_gettime", {time.CLOCK_BOOTTIME: 5.0}.get):
            self.assertEqual(nexus.Clock().monotonic(), 5.0)

    def test_setting_the_computers_clock_moves_nothing(self):
        store = nexus.Store(nexus.Settings({"db": ":memory:"}))
        self.addCleanup(store.close)
        sid = store.sessions.create(100, 5, None, None)["sessionId"]
        before, real = store.clock.now(), time.time
        self.assertAlmostEqual(before / 1000, real(), delta=60)
        for jump in (1e6, -1e6):
            with patched(time, "time", lambda: real() + jump):
                self.assertEqual(store.sessions.status(sid)["state"], "active")
                self.assertTrue(0 <= store.clock.now() - before < 60000)


# ----------------------------------------------------------------------------------------
# Door 1: pairing
#
# A code is easy to say and hard to guess, works once and only by claiming, and tells whoever
# guesses to go away.
# ----------------------------------------------------------------------------------------

class PairingTest(Door1Case):

    SETTINGS = {"trust_proxy": True}

    def setUp(self):
        self.s.clock.advance(60)            # every test has its wrong codes free
        self.sid, _ = self.s.session(ttl=3000)

    def pair(self, sid=None):
        return self.expect(self.s.call("PUT", "/v1/pair", {"sessionId": sid or self.sid}), 201)

    def state(self, code):
        return self.s.call("GET", "/v1/pair/%s/status" % code).json.get("state")

    def claim(self, code, agent="bob", address=""):
        return self.s.call("POST", "/v1/pair/%s/claim" % code, agent=agent,
                           headers={"X-Forwarded-For": address})

    def test_a_code_has_the_promised_shape_and_link(self):
        found = self.pair()
        self.assertEqual(set(found), names("code url expiresAt"))
        first, second, symbols = found["code"].split("-")
        self.assertTrue({first, second} <= set(nexus.WORDS))
        self.assertRegex(symbols, r"\A[0-9A-HJKMNP-TV-Z]{5}\Z")
        self.assertEqual(found["url"], "%s/p/%s" % (self.s.url, found["code"]))
        self.assertEqual(when(found["expiresAt"]), self.s.clock.now() + 600000)

    def test_the_words_keep_their_rules_and_the_odds_their_arithmetic(self):
        self.assertEqual((len(nexus.WORDS), len({word[:4] for word in nexus.WORDS})), (256, 256))
        for word in nexus.WORDS:
            self.assertRegex(word, r"\A[A-Z]{4,6}\Z")
        self.assertEqual(256 ** 2 * len(set(nexus.SYMBOLS)) ** 5, 2 ** nexus.CODE_BITS)
        self.assertGreaterEqual(nexus.CODE_BITS, 40)
        self.assertFalse(set("ILOU") & set(nexus.SYMBOLS))
        self.assertEqual(len({nexus.new_code() for _ in range(500)}), 500)
        for word in nexus.WORDS:            # written in one, each code is read in one way
            for code in (word + "-AMBER-0Z1Y2", "AMBER-" + word + "-0Z1Y2"):
                self.assertEqual(nexus.read_code(code.replace("-", "").lower()), code)

    def test_spelling_is_forgiven(self):
        with patched(nexus, "new_code", lambda: "PEARL-FOCAL-0A1B1"):
            self.pair()
        for text in ("pearl-focal-oaib1", "PEARL FOCAL 0A1BL", "pearl_focal_oalbi",
                     "pearlfocal0a1b1", " Pearl - Focal - 0A1B1 ", "PEARL.FOCAL.0A1B1",
                     "http://127.0.0.1:3456/p/PEARL-FOCAL-0A1B1",
                     "https://example.org/nexus/p/pearl-focal-oaibi/?utm=x#top"):
            self.assertEqual(self.state(nexus.percent(text)), "pending", text)
        self.expect(self.claim(nexus.percent(text)), 200)

    def test_claiming_joins_once(self):
        code = self.pair()["code"]
        found = self.expect(self.claim(code), 200)
        self.assertEqual(set(found), names("sessionId status sessionKey"))
        self.assertEqual((found["sessionId"], found["status"]), (self.sid, "claimed"))
        self.expect(self.s.send(self.sid, "bob", "x", found["sessionKey"]), 201)
        self.assertEqual(self.state(code), "claimed")
        self.expect(self.claim(code, "eve"), 404, "code_expired_or_used")
        self.assertEqual(self.s.call("GET", "/v1/sessions/" + self.sid).json["agents"],
                         ["ada", "bob"])

    def test_of_fifty_who_claim_one_code_one_gets_it(self):
        code, start = self.pair()["code"], threading.Event()

        def claim(number):
            start.wait(10)
            return self.claim(code, "agent-%d" % number, "203.0.113.%d" % number)
        calls = [Started(claim, number) for number in range(50)]
        start.set()
        self.assertEqual(collections.Counter(call.result().status for call in calls),
                         {200: 1, 404: 49})
        self.assertEqual(len(self.s.call("GET", "/v1/sessions/" + self.sid).json["agents"]), 2)

    def test_a_code_ends_after_ten_minutes_or_with_its_session(self):
        code = self.pair()["code"]
        for seconds, state in ((590, "pending"), (11, "expired")):
            self.s.clock.advance(seconds)
            self.assertEqual(self.state(code), state)
        short = self.pair(self.s.session(ttl=10)[0])["code"]
        self.s.clock.advance(11)
        for sweep in (lambda: None, self.s.sweep):
            sweep()
            for over in (code, short):
                self.assertEqual(self.state(over), "expired")
                self.expect(self.claim(over), 404, "code_expired_or_used")
                self.expect(self.s.call("GET", "/p/" + over), 404, "code_expired_or_used")

    def test_looking_never_claims(self):
        code = self.pair()["code"]
        for path in ("/p/%s", "/v1/pair/%s/skill", "/v1/pair/%s/status"):
            for method in ("GET", "HEAD", "GET"):
                self.expect(self.s.call(method, path % code), 200)
        self.expect(self.s.call("GET", "/v1/pair/%s/claim" % code), 405, "method_not_allowed")
        self.expect(self.claim(code), 200)

    def test_a_claim_that_fails_burns_nothing(self):
        sid, keys = self.s.session(("ada", "eve"), maxAgents=2)
        code = self.pair(sid)["code"]
        for agent, status, error in ((None, 400, "missing_agent_id"),
                                     ("a b", 400, "invalid_request"),
                                     ("system", 400, "invalid_request"),
                                     ("eve", 409, "agent_id_taken"), ("bob", 409, "session_full")):
            self.expect(self.claim(code, agent), status, error)
        self.s.call("DELETE", "/v1/sessions/%s/agents/eve" % sid, agent="eve", key=keys["eve"])
        self.expect(self.claim(code), 200)

    def test_a_code_never_given_out_is_not_found(self):
        for method, path in (("GET", "/p/%s"), ("GET", "/v1/pair/%s/skill"),
                             ("GET", "/v1/pair/%s/status"), ("POST", "/v1/pair/%s/claim")):
            self.s.clock.advance(60)
            for code in (LOST, LOST + "0", LOST.replace("0", "U"), "AMBER", "%F0%9F%98%80"):
                self.expect(self.s.call(method, path % code, agent="bob"), 404, "code_not_found")

    def test_wrong_codes_have_a_budget_per_address(self):
        code, used, misses = self.pair()["code"], self.pair()["code"], self.s.store.sessions.misses
        self.claim(used, "eve")
        self.assertEqual((misses.limit, misses.seconds), (20, 60))
        with patched(misses, "limit", 4):
            for look in ("/p/%s", "/v1/pair/%s/status", "/v1/pair/%s/skill"):
                self.assertLess(self.s.call("GET", look % used).status, 429)
                self.expect(self.s.call("GET", look % code), 200)       # right ones cost nothing
            self.expect(self.claim(LOST), 404, "code_not_found")
            for answer in (self.claim(code), self.s.call("GET", "/p/" + code),
                           self.s.call("GET", "/v1/pair/%s/status" % code)):
                self.expect(answer, 429, "rate_limit_exceeded")         # not even right ones now
                self.assertTrue(1 <= int(answer.headers["retry-after"]) <= 60)
            self.expect(self.claim(code, address="203.0.113.9"), 200)
            self.s.clock.advance(60)
            self.assertEqual(self.state(code), "claimed")

    def test_good_codes_cost_nothing_however_they_are_used(self):
        with patched(nexus, "CODE_MISSES_PER_ADDRESS", 2), patched(nexus, "CODE_MISSES_IN_ALL", 2):
            self.s = self.server()
        self.sid, _ = self.s.session()
        for number in range(4):
            code = self.pair()["code"]
            found = [self.s.call("GET", "/p/" + code), self.claim(code, "ada"),
                     self.s.call("GET", "/v1/pair/%s/status" % code),
                     self.claim(code, "guest-%d" % number)]
            self.assertEqual([each.status for each in found], [200, 409, 200, 200])

    def test_wrong_codes_have_a_budget_over_all_addresses(self):
        misses, budget = self.s.store.sessions.misses, self.s.store.sessions.all_misses
        self.assertEqual((budget.limit, budget.seconds), (1000, 60))
        one_site = ["2001:db8:1:2::%x" % n for n in range(1, 4)]       # owns them all
        for which, addresses in ((budget, ["203.0.113.%d" % n for n in range(3)]),
                                 (misses, one_site)):
            self.s.clock.advance(60)
            with patched(which, "limit", 2):
                self.assertEqual([self.claim(LOST, address=each).status for each in addresses],
                                 [404, 404, 429])


# ----------------------------------------------------------------------------------------
# Door 1: pages
#
# The page behind a link teaches by lines that run as printed; a browser gets the same as HTML in
# which nothing foreign can act.
# ----------------------------------------------------------------------------------------

class SpectatorTest(Door1Case):
    """Who has the link reads along, and has no place, no name and no voice."""

    def test_a_link_reads_until_it_is_withdrawn_or_the_session_ends(self):
        sid, keys = self.s.session(("ada", "bob"), greeting="Hi", ttl=60)
        path = "/v1/sessions/%s/watch" % sid

        def read(url, query=""):
            return self.s.call("GET", "/v1/watch" + query, headers={
                "X-Watch-Token": url.partition("#")[2]})
        for agent, key, status, error in (
                ("ada", None, 401, "missing_session_key"), ("ada", keys["bob"], 403,
                 "invalid_session_key"), ("eve", keys["ada"], 403, "forbidden")):
            for method in ("PUT", "DELETE"):
                self.expect(self.s.call(method, path, agent=agent, key=key), status, error)
        made = [self.expect(self.s.call("PUT", path, agent="bob", key=keys["bob"]), 201)
                for _ in "12"]
        self.assertRegex(made[0]["url"], r"^%s/w#[\w-]{22}$" % self.s.url)
        self.s.send(sid, "ada", "hello", keys["ada"])
        before = self.s.call("GET", "/v1/sessions/" + sid).json
        self.s.clock.advance(5)
        for each in made:
            found = self.expect(read(each["url"]), 200)
            self.assertEqual(sorted(found), ["expiresAt", "members", "messages", "more",
                                             "nextCursor"])
            self.assertEqual([row["text"] for row in found["messages"]], ["Hi", "hello"])
            self.assertNotIn(sid, json.dumps(found))
        self.assertEqual(self.s.call("GET", "/v1/sessions/" + sid).json, before)    # none was here
        waiting = Started(read, made[0]["url"], "?after=1&wait=30")
        until(lambda: self.s.store.waiters.parked)
        self.s.send(sid, "ada", "again", keys["ada"])
        self.assertEqual(waiting.result().json["messages"][0]["text"], "again")
        stored = self.s.store.db.read("SELECT token_hash FROM watches")
        self.assertIn((nexus.digest(made[0]["url"].partition("#")[2]),), stored)
        waiting = Started(read, made[1]["url"], "?after=2&wait=30")
        until(lambda: self.s.store.waiters.parked)
        self.assertEqual(self.s.call("DELETE", path, agent="ada", key=keys["ada"]).json,
                         {"ok": True, "withdrawn": 2})
        self.expect(waiting.result(), 404, "watch_not_found")
        self.expect(read(made[0]["url"]), 404, "watch_not_found")
        self.expect(self.s.call("GET", "/v1/watch"), 400, "invalid_request")
        last = self.s.call("PUT", path, agent="ada", key=keys["ada"]).json["url"]
        self.s.clock.advance(61)
        self.expect(read(last), 404, "watch_not_found")
        self.s.sweep()
        self.assertEqual(self.s.store.db.read("SELECT * FROM watches"), [])

    def test_there_are_so_many_links_and_no_more(self):
        sid, keys = self.s.session()
        with patched(nexus, "MAX_WATCHES", 2):
            found = [self.s.call("PUT", "/v1/sessions/%s/watch" % sid, agent="ada",
                                 key=keys["ada"]).status for _ in range(3)]
        self.assertEqual(found, [201, 201, 429])


class PageTest(Case):

    def setUp(self):
        self.s, self.home = self.server(), self.folder()
        self.sid, keys = self.s.session(greeting="Hello guest")
        self.s.send(self.sid, "ada", "Are you there?", keys["ada"])
        self.code = self.s.call("PUT", "/v1/pair", {"sessionId": self.sid}).json["code"]

    def page(self, path, accept="*/*"):
        answer = self.s.call("GET", path, headers={"Accept": accept})
        self.expect(answer, 200)
        return answer

    def blocks(self, path):
        """The command lines of a page."""
        return re.findall(r"```sh\n(.*?)```", self.page(path).text, re.S)

    def run_block(self, block):
        """Run command lines as printed; returns the JSON objects on stdout."""
        if not (shutil.which("bash") and shutil.which("curl")):
            self.skipTest("bash and curl are not both here")
        done = subprocess.run(["bash", "-ec", block], cwd=self.home, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=30,
                              env=clean_environment(self.home, NO_PROXY="127.0.0.1"))
        self.assertEqual((done.returncode, done.stderr), (0, b""), block)
        return [json.loads(each) for each in
                re.findall(r"\{.*?\}(?=\{|\Z)", done.stdout.decode(), re.S)]

    def test_the_lines_behind_a_code_run_as_printed(self):
        claim, read, wait, write, leave = self.blocks("/p/" + self.code)
        saved = os.path.join(self.home, "nexus-%s.json" % self.code)
        self.assertEqual(self.run_block(claim), [])
        with open(saved, encoding="utf-8") as file:
            self.assertEqual(json.load(file)["sessionId"], self.sid)
        for block, expected in ((read, ["Hello guest", "Are you there?"]),
                                (wait, ["Are you there?"])):
            found, = self.run_block(block)
            self.assertEqual([each["text"] for each in found["messages"]], expected)
        self.assertEqual(self.run_block(write)[0]["cursor"], "2")
        message = self.s.poll(self.sid, "ada").json["messages"][-1]
        self.assertEqual((message["agentId"], message["verified"]),
                         ("guest-" + self.code[-5:].lower(), True))
        self.assertTrue(self.run_block(leave)[0]["ok"])
        self.assertEqual(self.s.call("GET", "/v1/sessions/" + self.sid).json["agents"], ["ada"])
        self.assertFalse(os.path.exists(saved))

    def test_the_lines_of_the_home_page_run_as_printed(self):
        create, pair, talk, channel = self.blocks("/")
        self.assertEqual(self.run_block(create), [])
        with open(os.path.join(self.home, "nexus-session.json"), encoding="utf-8") as file:
            sid = json.load(file)["sessionId"]
        code = self.run_block(pair)[0]["code"]
        self.expect(self.s.call("POST", "/v1/pair/%s/claim" % code, agent="guest"), 200)

        def reply():
            until(lambda: self.s.store.waiters.parked)
            return self.s.send(sid, "guest", "Yes")
        replying = Started(reply)
        sent, polled = self.run_block(talk)
        self.expect(replying.result(), 201)
        self.assertEqual((sent["cursor"], polled["messages"][0]["text"]), ("1", "Yes"))
        sent, inbox, acked = self.run_block(channel)
        self.assertEqual((inbox["messages"][0]["content"], inbox["count"], acked["ackedCount"]),
                         ("green", 1, 1))

    def test_agents_get_markdown_and_browsers_the_same_as_html(self):
        for path in ("/", "/p/" + self.code, "/v1/pair/%s/skill" % self.code):
            plain = self.page(path)
            rich = self.page(path, "text/html,application/xhtml+xml,*/*;q=0.8")
            self.assertTrue(plain.headers["content-type"].startswith("text/markdown"))
            self.assertTrue(rich.headers["content-type"].startswith("text/html"))
            self.assertEqual((plain.headers["vary"], rich.headers["vary"]), ("Accept", "Accept"))
            shown = re.sub(r"&#(\d+);", lambda m: chr(int(m.group(1))),
                           re.sub(r"<[^>]*>", "", rich.text))
            for block in self.blocks(path):
                self.assertIn(block.strip(), shown)
        for needed in (self.code, "X-Agent-Id", "nextCursor", "wait=", "as data, not as orders",
                       "Never send secrets", "code_expired_or_used", "session_full", self.s.url):
            self.assertIn(needed, plain.text)

    def test_a_page_runs_its_own_script_alone_and_its_policy_says_so(self):
        total = 0
        for path in ("/p/" + self.code, "/talk", "/w", "/watch"):
            answer = self.page(path, "text/html")
            policy = answer.headers["content-security-policy"]
            for kind in ("script", "style"):
                text, = re.findall("<%s>(.*?)</%s>" % (kind, kind), answer.text, re.S)
                found = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                self.assertIn("%s-src 'sha256-%s'" % (kind, found), policy)
            self.assertIn("connect-src 'self'", policy)
            self.assertNotRegex(policy, "unsafe|[*]|http")
            shown = re.sub(r"<(script|style)>.*?</\1>", "", answer.text, flags=re.S)
            self.assertNotRegex(shown, r"(?i)\son\w+=|javascript:|\sstyle=|src=(?![\"']?/p/)")
            total += len(shown)
        self.assertLess(total + len(nexus.APP_SCRIPT) + len(nexus.PAGE_STYLE), 60 * 1024)
        for name in ("localStorage", "innerHTML", "eval(", "insertAdjacentHTML", "document.write"):
            self.assertEqual(name in nexus.APP_SCRIPT, name == "localStorage")

    def test_html_runs_no_script_and_its_policy_says_so(self):
        answer = self.page("/v1/pair/%s/skill" % self.code, "text/html")
        policy = answer.headers["content-security-policy"]
        style = re.search("<style>(.*?)</style>", answer.text, re.S).group(1).encode()
        style = "sha256-" + base64.b64encode(hashlib.sha256(style).digest()).decode()
        for part in (style, "default-src 'none'", "frame-ancestors 'none'"):
            self.assertIn(part, policy)
        self.assertNotRegex(policy, "script|unsafe|[*]")
        self.assertNotRegex(answer.text, r"(?i)<script|<img|\son\w+=|javascript:|src=")
        self.assertEqual((answer.headers["x-content-type-options"],
                          answer.headers["referrer-policy"]), ("nosniff", "no-referrer"))

    def test_nothing_foreign_becomes_markup(self):
        evil, html = "\"'><img src=x onerror=alert(1)>&amp;`**<script>", {"Accept": "text/html"}
        server = self.server(base_url="http://nexus.example/" + evil)
        markdown = "# %s\n\n%s\n\n- %s\n\n```sh\n%s\n```\n" % ((evil,) * 4)
        for text in (server.call("GET", "/", headers=html).text, nexus.html_page(markdown)):
            self.assertIn("onerror", text)
            self.assertNotRegex(text, "<img|<script")
        for path in ("/p/", "/"):
            answer = self.s.call("GET", path + nexus.percent(evil), headers=html)
            self.assertEqual((answer.status, answer.headers["content-type"]),
                             (404, "text/html; charset=utf-8"))      # a page that says so
            self.assertNotRegex(answer.text, "<img|<script")
            self.assertEqual(self.s.call("GET", path + nexus.percent(evil)).headers["content-type"],
                             "application/json")


# ----------------------------------------------------------------------------------------
# Door 1: redaction and repeated sends
#
# A secret is blacked out before it is stored, wherever it stands; a send that is repeated with
# its Idempotency-Key stores nothing new.
# ----------------------------------------------------------------------------------------

class SendTest(Door1Case):

    def send(self, body, key=None, agent="ada", server=None, session_key=None):
        return (server or self.s).call("POST", self.posts, body, agent, session_key,
                                       headers={"Idempotency-Key": key} if key else None)

    def test_secrets_are_blacked_out_in_text_and_in_keys_and_values_of_json(self):
        found = self.expect(self.send({"text": "use %s, please" % TOKEN}), 201)
        self.assertEqual(set(found), names("ok id cursor expiresAt redacted"))
        self.assertEqual(found["redacted"], ["github-token"])
        self.assertEqual(self.last()["text"], "use [REDACTED:github-token], please")
        found = self.expect(self.send({"text": "url http://ada:" + "s3cr3t@host/", "json": {
            "deep": [{"password": "hunter2!"}, TOKEN], TOKEN: 1, "n": 1.5, "none": None}}), 201)
        self.assertEqual(found["redacted"], ["github-token", "password", "url-password"])
        self.assertEqual(self.last()["text"], "url http://ada:[REDACTED:url-password]@host/")
        self.assertEqual(self.last()["json"], {
            "deep": [{"password": "[REDACTED:password]"}, "[REDACTED:github-token]"],
            "[REDACTED:github-token]": 1, "n": 1.5, "none": None})
        found = self.s.call("PUT", "/v1/sessions", {"greeting": TOKEN, "creatorAgentId": "ada"})
        self.assertEqual([found.json["greeting"]] + texts(self.s.poll(found.json["sessionId"],
                                                                      "ada")),
                         ["[REDACTED:github-token]"] * 2)

    def test_keys_of_living_sessions_are_blacked_out_and_other_hashes_left(self):
        _, keys = self.s.session(("eve",), ttl=10)
        for key in (self.keys["ada"], keys["eve"], keys["eve"].upper()):
            found = self.send({"text": "see %s." % key, "json": [key]}).json
            self.assertEqual(found["redacted"], ["session-key"])
            self.assertEqual((self.last()["text"], self.last()["json"]),
                             ("see [REDACTED:session-key].", ["[REDACTED:session-key]"]))
        self.s.clock.advance(11)
        for text in (keys["eve"], hashlib.sha256(b"x").hexdigest(), self.sid, "a" * 64,
                     self.keys["ada"] + "0"):
            self.assertNotIn("redacted", self.send({"text": text}).json)
            self.assertEqual(self.last()["text"], text)

    def test_a_repeated_send_gets_the_first_answer_and_stores_nothing(self):
        for key, body in (("a", {"text": "a"}), ("b", {"json": {"b": 1, "a": [2]}}),
                          ("c", {"text": TOKEN})):
            first, again = self.send(body, key), self.send(body, key)
            self.assertNotIn("idempotent-replay", first.headers)
            self.assertEqual((again.status, again.headers["idempotent-replay"], again.json),
                             (201, "true", first.json))
        same = json.dumps({"json": {"a": [2], "b": 1}}, indent=4).encode()
        self.assertEqual(self.send(same, "b").headers.get("idempotent-replay"), "true")
        self.assertEqual(len(texts(self.s.poll(self.sid, "bob"))), 3)
        calls = [Started(self.send, {"text": "x"}, "k") for _ in range(10)]
        self.assertEqual({call.result().json["cursor"] for call in calls}, {"4"})

    def test_another_body_under_the_same_key_is_refused(self):
        for key, first, *others in (("k", {"text": "a"}, {"text": "b"}, {"text": "a", "json": 1},
                                     {"json": "a"}), ("n", {"json": 1}, {"json": True})):
            self.expect(self.send(first, key), 201)
            for body in others:
                self.expect(self.send(body, key), 409, "idempotency_key_reused")
        self.assertEqual(len(texts(self.s.poll(self.sid, "bob"))), 2)

    def test_a_key_counts_for_one_sender_in_one_session_and_for_what_was_stored(self):
        for body, key, session_key, status, code in (
                ({"text": "a"}, "k", "0" * 64, 403, "invalid_session_key"),
                ({"text": 5}, "k", None, 400, "invalid_request"),
                ({"text": "a"}, "k" * 129, None, 400, "invalid_request")):
            self.expect(self.send(body, key, session_key=session_key), status, code)
        sent = [self.send({"text": "b"}, "k"), self.send({"text": "b"}, "k", "bob")]
        sid, _ = self.s.session()
        sent.append(self.s.call("POST", "/v1/sessions/%s/messages" % sid, {"text": "b"}, "ada",
                                headers={"Idempotency-Key": "k"}))
        self.assertEqual([each.json["cursor"] for each in sent], ["1", "2", "1"])

    def test_everything_survives_a_restart(self):
        path = os.path.join(self.folder(), "nexus.db")
        server = self.server(db=path)
        self.sid, keys = server.session(("ada", "bob"), greeting="Hello")
        self.posts = "/v1/sessions/%s/messages" % self.sid
        first = self.send({"text": "a", "json": [1]}, "k", server=server).json
        code = server.call("PUT", "/v1/pair", {"sessionId": self.sid}).json["code"]
        before = server.poll(self.sid, "bob").json["messages"][1:]
        server.stop()
        server = self.server(db=path)
        self.assertEqual(self.send({"text": "a", "json": [1]}, "k", server=server).json, first)
        self.assertEqual(self.send({"text": "b"}, server=server, session_key=keys["ada"]).json[
            "cursor"], "2")
        self.assertEqual(server.poll(self.sid, "bob", "?after=0&limit=1").json["messages"], before)
        self.expect(server.call("POST", "/v1/pair/%s/claim" % code, agent="eve"), 200)


# ----------------------------------------------------------------------------------------
# HTTP manners
#
# What HTTP/1.1 clients may expect of any server, they get from this one; every answer has an
# X-Request-Id, every refusal a JSON body.
# ----------------------------------------------------------------------------------------

class HttpTest(Door1Case):

    SETTINGS = {"max_body": 300}

    def head(self, *lines):
        """The head of a send, with these header lines more."""
        return "\r\n".join(("POST %s HTTP/1.1" % self.posts, "Host: localhost", "X-Agent-Id: ada")
                           + lines + ("", "")).encode()

    def ask(self, data):
        """The answers to some bytes."""
        return answers(self.s.raw(data, half_close=True))

    def test_every_answer_has_a_request_id_of_its_own(self):
        found = [self.s.call("GET", path) for path in ("/", "/health", "/nowhere", self.posts)]
        found += [self.s.call("PATCH", "/health"), self.s.call("HEAD", "/health"),
                  self.s.call("PUT", "/v1/sessions", b"{"), *self.ask(b"nonsense\r\n\r\n"),
                  *self.ask(self.head("Content-Length: 301"))]
        self.assertEqual([each.status for each in found],
                         [200, 200, 404, 400, 405, 200, 400, 400, 413])
        self.assertEqual(len({each.headers["x-request-id"] for each in found}), len(found))

    def test_head_answers_like_get_without_the_body(self):
        for path in ("/", "/health", self.path, "/openapi.json", "/nowhere"):
            get_, head = self.s.call("GET", path), self.s.call("HEAD", path)
            self.assertEqual((head.status, head.text), (get_.status, ""))
            for name in ("content-length", "content-type"):
                self.assertEqual(head.headers[name], get_.headers[name], path)
        raw = self.s.raw(b"HEAD / HTTP/1.0\r\n\r\n")
        self.assertEqual(raw.index(b"\r\n\r\n"), len(raw) - 4)

    def test_another_method_is_refused_with_those_allowed(self):
        for method, path, allowed in (
                ("POST", "/health", "GET HEAD"), ("GET", "/v1/sessions", "PUT"),
                ("HEAD", "/v1/pair", "PUT"), ("DELETE", self.posts, "GET HEAD POST"),
                ("BREW", "/", "GET HEAD"), ("get", "/", "GET HEAD")):
            answer = self.s.call(method, path)
            self.assertEqual((answer.status, set(answer.headers["allow"].split(", "))),
                             (405, names(allowed)))

    def test_every_refusal_has_its_status_and_code(self):
        create, plain = ("PUT", "/v1/sessions"), {"Content-Type": "text/plain"}
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        self.expect(self.s.call(*create, b"", headers=form), 201)
        for method, path, body, headers, status, code in (
                *((*create, body, None, 400, "invalid_body") for body in (
                    b"{", b"[]", b"null", b"\xff", b'{"ttl": 1} x')),
                (*create, b"{}", plain, 415, "unsupported_media_type"),
                (*create, b"ttl=1", form, 415, "unsupported_media_type"),
                (*create, b" " * 301, None, 413, "payload_too_large"),
                ("PUT", "/v1/pair", None, None, 400, "invalid_request"),
                ("PUT", "/v1/pair", {"sessionId": ""}, None, 400, "invalid_request"),
                ("GET", "/health", None, {"Host": "evil.example"}, 403, "host_not_allowed"),
                ("GET", "/health", None, {"Origin": "http://evil"}, 403, "origin_not_allowed"),
                ("GET", "/v1/nothing", None, None, 404, "not_found"),
                ("GET", "/v1/sessions/", None, None, 404, "not_found")):
            found = self.expect(self.s.call(method, path, body, headers=headers), status, code)
            self.assertTrue(len(found["message"]) > 10 and "_tag" not in found)
            self.assertEqual("details" in found, code == "invalid_request")

    def test_refusals_under_api_have_a_tag_for_the_other_door(self):
        for answer, tag in ((self.s.call("GET", "/api/nowhere"), "NotFound"),
                            (self.s.call("POST", "/api/messages", {}), "HttpApiDecodeError"),
                            (self.s.call("POST", "/api/messages", b" " * 301),
                             "PAYLOAD_TOO_LARGE")):
            self.assertEqual(answer.json.get("_tag"), tag, answer.text)

    def test_a_fault_of_ours_is_a_number_and_a_line_in_the_log(self):
        def fail(*_):
            raise ZeroDivisionError("quotes " + self.sid)
        with patched(self.s.store.sessions, "status", fail):
            answer = self.s.call("GET", self.path)
        self.assertEqual(set(self.expect(answer, 500, "internal_error")), names("error message"))
        line = self.s.lines.pop()
        self.assertIn(answer.headers["x-request-id"], line)
        self.assertNotIn(self.sid, line)

    def test_words_that_clients_guess_from_stand_only_where_they_are_meant(self):
        for code, (status, message) in nexus.ERRORS.items():
            text = message.lower()
            self.assertTrue("404" not in text and ("not found" not in text or status == 404), code)
            self.assertTrue("not in session" not in text or code == "forbidden", code)
            self.assertTrue("expired" not in text or "expired" in code
                            or code == "session_not_found", code)

    def test_connections_are_kept_until_the_client_says_otherwise(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.s.port, timeout=10)
        self.addCleanup(connection.close)
        used = set()
        for path in ("/health", "/nowhere", "/v1/sessions/" + UNKNOWN, "/health"):
            connection.request("GET", path)
            connection.getresponse().read()
            used.add(connection.sock.getsockname())
        self.assertEqual(len(used), 1)
        for request in (get("/health", "Connection: close"), b"GET /health HTTP/1.0\r\n\r\n"):
            answer, = answers(self.s.raw(request))
            self.assertEqual((answer.status, answer.headers["connection"]), (200, "close"))

    def test_pipelined_requests_are_answered_in_order_and_chunked_bodies_read(self):
        chunks = b'5;x="y"\r\n{"tex\r\nA\r\nt": "hello\r\n2\r\n"}\r\n000\r\nTrailer: x\r\n\r\n'
        found = self.ask(get("/health") + self.head("Content-Length: 13") + b'{"text": "x"}\r\n'
                         + self.head("Transfer-Encoding: Chunked") + chunks + get("/nowhere"))
        self.assertEqual([each.status for each in found], [200, 201, 201, 404])
        self.assertEqual(texts(self.s.poll(self.sid, "ada")), ["x", "hello"])

    def test_a_body_at_the_limit_is_fine_and_one_byte_more_is_not(self):
        for size, status in ((300, 201), (301, 413)):
            body = b'{"text": "%s"}' % (b"x" * (size - 12))
            half = b"%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (100, body[:100], size - 100, body[100:])
            for data in (self.head("Content-Length: %d" % size) + body,
                         self.head("Transfer-Encoding: chunked") + half):
                self.assertEqual([each.status for each in self.ask(data)], [status])

    def test_expect_100_continue_is_answered_before_the_body_comes(self):
        with socket.create_connection(("127.0.0.1", self.s.port), 10) as sock:
            sock.sendall(self.head("Content-Length: 13", "Expect: 100-continue"))
            self.assertEqual(sock.recv(100), b"HTTP/1.1 100 Continue\r\n\r\n")
            sock.sendall(b'{"text": "x"}')
            self.assertTrue(sock.recv(9999).startswith(b"HTTP/1.1 201 "))
            sock.sendall(self.head("Content-Length: 301", "Expect: 100-continue"))
            self.assertTrue(sock.recv(9999).startswith(b"HTTP/1.1 413 "))

    def test_too_many_connections_are_told_to_come_back(self):
        server = self.server(max_connections=1)
        with socket.create_connection(("127.0.0.1", server.port)):
            until(lambda: server.server.connections)
            answer, = answers(server.raw(b""))
            self.expect(answer, 503, "server_busy")
            self.assertLessEqual(names("retry-after x-request-id"), set(answer.headers))
        until(lambda: not server.server.connections)
        self.expect(server.call("GET", "/health"), 200)

    def test_full_places_say_so_and_when_to_come_back(self):
        server = self.server(max_sessions=2, max_codes=1, max_session_messages=2,
                             max_session_bytes=1024)
        (sid, _), (other, _) = server.session(), server.session()
        self.expect(server.call("PUT", "/v1/pair", {"sessionId": sid}), 201)
        for text in ("a", "b"):
            self.expect(server.send(sid, "ada", text), 201)
        for answer in (server.send(sid, "ada", "c"), server.call("PUT", "/v1/sessions"),
                       server.send(other, "ada", "x" * 1025),
                       server.call("PUT", "/v1/pair", {"sessionId": sid})):
            self.expect(answer, 429, "quota_exceeded")
            self.assertGreater(int(answer.headers["retry-after"]), 0)
        server.clock.advance(90000)
        server.sweep()
        self.expect(server.call("PUT", "/v1/sessions"), 201)

    def test_the_log_names_operations_and_nothing_private(self):
        server = self.server(verbose=True)
        sid, keys = server.session(["zoe"])     # no hexadecimal word: a request's id is one
        code = server.call("PUT", "/v1/pair", {"sessionId": sid}).json["code"]
        server.send(sid, "zoe", "private words", keys["zoe"])
        for path in ("/p/" + code, "/v1/pair/%s/status" % code, "/" + sid, "/%0d%0aforged"):
            server.call("GET", path)
        until(lambda: len(server.lines) == 7)
        log = "\n".join(server.lines)
        server.lines.clear()
        self.assertIn("POST /v1/sessions/{session_id}/messages 201", log)
        for private in (sid, keys["zoe"], code, "private words", "zoe", "forged"):
            self.assertNotIn(private, log)
        self.assertEqual(nexus.one_line("a\r\nb\x1b[0m\x85\x7f"), "a??b?[0m??")


# ----------------------------------------------------------------------------------------
# The parser
#
# Beside the parser of the standard library: what both take they read alike, and what that one
# refuses ours refuses too. What ours refuses besides is what two programs could read in two ways.
# ----------------------------------------------------------------------------------------

class Stock(nexus.http_server.BaseHTTPRequestHandler):
    """How http.server reads a request, without a socket: accepted, command, path, headers."""

    def __init__(self, raw):
        self.rfile, self.wfile, self.client_address = io.BytesIO(raw), io.BytesIO(), ("", 0)
        self.raw_requestline = self.rfile.readline(65537)
        self.accepted = self.parse_request()

    def send_error(self, code, message=None, explain=None):
        """Nobody listens."""


def parsed(raw):
    """What our parser makes of a request: a Request, or None if it is refused."""
    try:
        return nexus.parse_head(raw.partition(b"\r\n\r\n")[0])
    except nexus.NexusError:
        return None


class ParserTest(Case):

    HOST = b"Host: localhost\r\n"
    GOOD = [b"%s HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % pair for pair in (
        (b"GET /", b""), (b"GET /health", b"Accept: */*\r\n"), (b"HEAD /", b"X:\r\n"),
        (b"POST /v1/sessions", b"Content-Length: 0\r\n"), (b"PUT /a", b"Content-Length: 000\r\n"),
        (b"DELETE /a/b?c=d&e=%20", b"X-Agent-Id:ada\r\n"), (b"GET /%2F%00", b"x-UP: Case\r\n"),
        (b"BREW /pot", b"A:  b \t\r\n"), (b"GET /?", b"A: b\r\nA: c\r\n"),
        (b"GET /?a?b", b"A: b\r\nA: b\r\n"), (b"GET /:@!$'()*+,;=", b"A: b: c\r\n"),
        (b"GET /" + b"a" * 4000, b"B: " + b"b" * 4000 + b"\r\n"), (b"M-SEARCH /", b"A: \xe9\r\n"),
        (b"POST /", b"Transfer-Encoding: chunked\r\n"), (b"POST /", b"Content-Length: 15\r\n"),
        (b"POST /", b"Content-Length: 5\r\nContent-Length: 5\r\n"),
        (b"GET /", b"".join(b"X-%d: y\r\n" % n for n in range(60))))
    ] + [b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"]
    BAD_LINES = (
        b"", b"GET", b"GET /", b"POST /", b"GET  / HTTP/1.1", b"GET / HTTP/1.1 ",
        b" GET / HTTP/1.1", b"GET / x HTTP/1.1", b"GET\t/\tHTTP/1.1", b"GET / HTTP/2.0",
        b"GET / HTTP/1.2", b"GET / HTTP/0.9", b"GET / HTTP/1.1.1", b"GET / HTTP/x", b"GET / HTTP/1",
        b"GET / http/1.1", b"GET / HTTP/ 1.1", b"GET / HTTP/+1.1", b"GET / FTP/1.1",
        b"GET health HTTP/1.1", b"GET * HTTP/1.1", b"GET http://localhost/ HTTP/1.1",
        b"GET /#x HTTP/1.1", b"GET /\xc3\xa9 HTTP/1.1", b"G(T / HTTP/1.1", b"G\xe9T / HTTP/1.1",
        b"GET /\0 HTTP/1.1", b"GET /a\tb HTTP/1.1", b"GET / HTTP/1.1\r", b"\r\nGET / HTTP/1.1")
    BAD_HEADERS = (
        b"Host: evil", b"no colon", b": x", b"A : b", b" A: b", b"A: b\r\n folded",
        b"A: b\r\n\tfolded", b"A: b\nB: c", b"A: b\rB: c", b"A: \0", b"A: \x7f", b"A\xe9: b",
        b"(A): b",
        b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: -1", b"Content-Length: +5",
        b"Content-Length: 5, 5", b"Content-Length: 0x5", b"Content-Length: \xb2",
        b"Content-Length:", b"Content-Length: 5 5", b"Content-Length: " + b"9" * 5000,
        b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: gzip",
        b"X-Agent-Id: ada\r\nX-Agent-Id: bob", b"X-Session-Key: a\r\nx-session-key: b",
        b"\r\n".join(b"X-%d: y" % n for n in range(200)))

    def test_good_requests_are_read_as_the_standard_library_reads_them(self):
        for raw in self.GOOD:
            ours, stock = parsed(raw), Stock(raw)
            self.assertTrue(ours and stock.accepted, raw)
            target = ours.path + ("?" + ours.query if b"?" in raw else "")
            self.assertEqual((ours.method, target), (stock.command, stock.path))
            read = {}
            for name, value in stock.headers.items():
                read.setdefault(name.lower(), {})[value.strip(" \t")] = None
            self.assertEqual(ours.headers, {name: ", ".join(found) for name, found in read.items()})

    def test_bad_requests_are_refused(self):
        bad = [line + b"\r\n" + self.HOST + b"\r\n" for line in self.BAD_LINES]
        bad += [b"GET / HTTP/1.1\r\n" + self.HOST + lines + b"\r\n\r\n"
                for lines in self.BAD_HEADERS]
        bad += [b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
                b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n"]
        self.assertEqual([raw[:80] for raw in bad if parsed(raw) is not None], [])

    def test_as_many_header_lines_as_allowed_and_no_more(self):
        head = b"\r\n".join([b"GET / HTTP/1.1", b"Host: a"] + [b"X-%d: y" % n for n in range(9)])
        self.assertEqual(len(nexus.parse_head(head, 10).headers), 10)
        with self.assertRaises(nexus.NexusError) as caught:
            nexus.parse_head(head, 9)
        self.assertEqual(caught.exception.code, "headers_too_large")

    def test_whatever_the_standard_library_refuses_is_refused(self):
        chance, refused = random.Random(1), 0
        pieces = (b" ", b"\t", b"\r\n", b"\n", b"\r", b":", b"\0", b"HTTP/", b"1", b".", b"\xff",
                  b"/", b"A: b\r\n" * 101)
        for raw in self.GOOD * 30:
            at = chance.randrange(min(len(raw), 60))
            raw = raw[:at] + chance.choice(pieces) + raw[at + chance.randrange(3):]
            if not Stock(raw).accepted:
                refused += 1
                self.assertIsNone(parsed(raw), raw[:200])
        self.assertGreater(refused, 100)


# ----------------------------------------------------------------------------------------
# Hostile clients
#
# Whatever comes in over a socket gets a refusal in JSON or a closed connection; the next client is
# served, and nothing is left behind: no thread, no connection, no line in the log.
# ----------------------------------------------------------------------------------------

class HostileTest(ServerCase):

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.threads = set(threading.enumerate())

    def tearDown(self):
        self.expect(self.s.call("GET", "/health"), 200)
        until(lambda: not self.s.server.connections)
        until(lambda: set(threading.enumerate()) <= self.threads)

    def refused(self, statuses, *requests):
        """Send bytes; the only answer is one of these refusals, or (None) nothing at all."""
        for data in requests:
            found = answers(self.s.raw(data, half_close=True))
            self.assertLessEqual(len(found), 1, data[:100])
            self.assertIn(found[0].status if found else None, statuses, data[:100])
            if found:
                self.assertLessEqual({"error", "message"}, set(found[0].json))
                self.assertIn("x-request-id", found[0].headers)

    def put(self, body, *lines):
        """The bytes of a create, with an honest length unless `lines` say otherwise."""
        lines = lines or ("Content-Length: %d" % len(body),)
        return get("/v1/sessions", *lines).replace(b"GET", b"PUT", 1) + body

    def test_what_is_not_http_is_refused(self):
        self.refused({400, None}, bytes(range(256)) * 4, b"\r\n" * 1000,
                     b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64))
        self.refused({400}, b"hello\r\n\r\n", b"hello\n\n")
        self.refused({431}, b"GET /" + b"a" * 100000, get("/", "X: " + "a" * 100000),
                     get("/", *["X: y"] * 10000), get("/", *["X: y"] * 70))

    def test_bodies_that_lie_about_their_length_are_refused(self):
        chunked = "Transfer-Encoding: chunked"
        self.refused({400}, *(self.put(b"{}", *lines) for lines in (
            ("Content-Length: 1", "Content-Length: 2"), ("Content-Length: 2", chunked),
            ("Content-Length: -1",), ("Content-Length: 2e0",), ("Content-Length: " + "9" * 20,),
            ("Transfer-Encoding: gzip",), ("Content-Length: 2", "Expect: tea"))))
        self.refused({400}, *(self.put(body, chunked) for body in (
            b"-1\r\n", b"+2\r\n", b"0x2\r\n{}\r\n0\r\n\r\n", b"\r\n", b" \r\n", b"2\r\n{}xx",
            b"2 2\r\n{}\r\n0\r\n\r\n", b"1" * 2000, b"2\r\n{}\r\n0\r\n" + b"x" * 2000,
            b"fffffffff\r\n")))
        self.refused({413}, self.put(b"{}", "Content-Length: 999999999999"),
                     self.put(b"ffffffff\r\n", chunked))
        self.refused({431}, self.put(b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 70, chunked))
        self.refused({400, None}, self.put(b"{}", "Content-Length: 9"),
                     self.put(b"2\r\n{}\n", chunked), self.put(b"5\r\n{", chunked))

    def test_json_that_cannot_be_kept_is_refused(self):
        for body in (
                b"[" * 100000, b'{"a":' * 100000, b"[" * 100000 + b"]" * 100000, b'{"ttl": NaN}',
                b'{"ttl": Infinity}', b'{"ttl": -Infinity}', b'{"ttl": 1e999}', b'{"ttl": 01}',
                b'{"ttl": %s}' % (b"9" * 500), b'{"ttl": %s}' % (b"9" * 10000),
                b'{"greeting": "\\ud800"}', b'{"\\ud800": 1}',
                b'{"greeting": "\\udc00\\ud800"}', b'{"greeting": "\xff"}', b'{"greeting": "\0"}',
                b'{"greeting": "\xed\xa0\x80"}', b"\xef\xbb\xbf{}", b"{'ttl': 1}", b"{}{}", b"\0"):
            self.expect(self.s.call("PUT", "/v1/sessions", body), 400, "invalid_body")
        sid, _ = self.s.session()
        for depth, status in ((99, 201), (100, 400)):
            body = b'{"json": %s%s}' % (b"[" * depth, b"]" * depth)
            self.assertEqual(self.s.call("POST", "/v1/sessions/%s/messages" % sid, body,
                                         "ada").status, status)
        self.expect(self.s.send(sid, "ada", "[" * 1000 + '"\\' + "{" * 1000), 201)

    def test_odd_paths_lead_nowhere(self):
        guarded = self.server(token="secret")
        for path in ("/API/messages", "//v1/sessions", "/v1//sessions", "/v1/%2e%2e/v1/stats",
                     "/v1/../v1/stats", "/%76%31/stats", "/v1/stats/", "/v1/stats%00", "/v1/a;x",
                     "/v1%2fstats", "/V1/stats", "/v1/stats%20", "/./v1/stats"):
            self.expect(guarded.call("GET", path), 404, "not_found")
        guarded.stop()
        self.refused({400}, *(get(target) for target in (
            "http://localhost/health", "*", "localhost:80", "/health#x")))
        for path in ("/v1/sessions/a%2fb", "/v1/sessions/%2e%2e", "/v1/sessions/%00", "/p/%2f%2e"):
            self.assertEqual(self.s.call("GET", path).status, 404, path)
        for path in ("/v1/sessions/%ff", "/v1/pair/%c3%28/status", "/p/%ed%a0%80"):
            self.expect(self.s.call("GET", path), 400, "invalid_request")

        sid, _ = self.s.session()
        for query in ("?after=%ff", "?after=1.5", "?limit=1001", "?wait=1e1", "?after=",
                      "?after=" + "9" * 30, "?after=4294967296", "?limit=%D9%A1"):
            self.expect(self.s.poll(sid, "ada", query), 400, "invalid_request")

    def test_dribbling_is_served_in_time_and_cut_off_after_it(self):
        with socket.create_connection(("127.0.0.1", self.s.port), 10) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in b"GET /health HTTP/1.0\r\n\r\n":
                sock.sendall(bytes([byte]))
            self.assertTrue(sock.recv(999).startswith(b"HTTP/1.1 200 "))
        with patched(nexus, "HEAD_SECONDS", 0.1), patched(nexus, "BODY_SECONDS", 0.1):
            for data, more in (
                    (b"GET /", b"x"), (self.put(b"", "Content-Length: 9999"), b"x"),
                    (self.put(b"", "Transfer-Encoding: chunked"), b"1\r\nx\r\n")):
                with socket.create_connection(("127.0.0.1", self.s.port), 0.001) as sock:
                    sock.sendall(data)
                    until(lambda: self.cut_off(sock, more))

    @staticmethod
    def cut_off(sock, more):
        """Send a bit more, long before the last bit's time is over: has the server enough?"""
        try:
            sock.sendall(more)
            return sock.recv(99) == b""
        except socket.timeout:
            return False
        except ConnectionError:
            return True

    def test_who_says_nothing_for_long_is_sent_away(self):
        with patched(nexus, "IDLE_SECONDS", 0.5), patched(
                nexus.Connection, "_set_timeouts", lambda link: link.sock.settimeout(0.01)), \
                socket.create_connection(("127.0.0.1", self.s.port), 10) as sock:
            sock.sendall(get("/health"))
            self.assertTrue(sock.recv(999).startswith(b"HTTP/1.1 200 "))
            self.assertEqual(sock.recv(999), b"")

    def test_clients_that_vanish_are_forgotten(self):
        sid, _ = self.s.session()
        self.s.send(sid, "ada", "x" * 500000)
        for data in (b"", b"GET", get("/health") * 50, self.put(b"", "Content-Length: 9"),
                     get("/v1/sessions/%s/messages" % sid, "X-Agent-Id: ada") * 9):
            with socket.create_connection(("127.0.0.1", self.s.port)) as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.sendall(data)          # closing now is a reset


# ----------------------------------------------------------------------------------------
# Who is let in
#
# Names of this machine only, pages of this server only, tokens where the server has some, keys
# where agents have some; strangers are counted.
# ----------------------------------------------------------------------------------------

class AccessTest(Case):

    def health(self, server, **headers):
        """The status of a look at /health with these headers."""
        return server.call("GET", "/health", headers={
            name.replace("_", "-"): value for name, value in headers.items()}).status

    def fails(self, code, function, *args, **named):
        """The message of the NexusError with this code that the call raises."""
        with self.assertRaises(nexus.NexusError) as caught:
            function(*args, **named)
        self.assertEqual(caught.exception.code, code)
        return caught.exception.message

    def test_only_names_of_this_machine_are_answered(self):
        server = self.server(base_url="https://nexus.example:8443/sub")
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1", "192.0.2.7:3456", "[::1]:80",
                     "[fe80::1]", "nexus.example", "nexus.example:1", socket.gethostname()):
            self.assertEqual(self.health(server, Host=host), 200, host)
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "[::1",
                     "a@localhost", "localhost:x", "nexus.example.evil", "127.0.0.1:80:80",
                     "x[::1]"):
            self.assertEqual(self.health(server, Host=host), 403, host)

    def test_only_pages_of_this_server_may_ask(self):
        server = self.server(base_url="https://nexus.example")
        for origin in ("http://localhost:80", "https://nexus.example"):
            self.assertEqual(self.health(server, Host="localhost:80", Origin=origin), 200, origin)
        for origin in ("null", "http://localhost", "http://localhost:81", "http://evil.example",
                       "https://nexus.example.evil", "file://"):
            self.assertEqual(self.health(server, Host="localhost:80", Origin=origin), 403, origin)
        found = server.call("OPTIONS", "/v1/sessions", headers={"Origin": "http://evil.example"})
        self.assertFalse([name for name in found.headers if name.startswith("access-control")])

    def test_a_token_comes_as_bearer_or_api_key_and_must_be_right(self):
        server = self.server(token="s3cret")
        for name, value, status in (
                ("Authorization", "Bearer s3cret", 200), ("authorization", "bearer  s3cret", 200),
                ("X-Api-Key", "s3cret", 200), ("X", "s3cret", 401), ("X-Api-Key", "é", 401),
                ("Authorization", "Bearer", 401), ("Authorization", "Bearer s3cre", 401),
                ("X-Api-Key", "S3cret", 401), ("Authorization", "Basic s3cret", 401)):
            self.expect(server.call("GET", "/v1/stats", headers={name: value}), status,
                        None if status == 200 else "unauthorized")

    def test_tokens_from_a_file_can_be_added_and_withdrawn(self):
        path = os.path.join(self.folder(), "tokens")
        self.assertIn(path, self.fails("refused_to_start", Server, token_file=path))
        server = None
        for text, accepted in (("one\n# two\n\n", ["one", "fixed"]), ("two\n", ["two", "fixed"]),
                               ("one\n  two \n", ["one", "two", "fixed"]), (None, ["fixed"])):
            if text is None:
                os.unlink(path)
            else:
                with open(path, "w", encoding="utf-8") as file:
                    file.write(text)
            server = server or self.server(token_file=path, token="fixed")
            found = [token for token in ("one", "two", "# two", "fixed") if server.call(
                "GET", "/v1/stats", headers={"X-Api-Key": token}).status == 200]
            self.assertEqual(found, accepted)

    def test_secrets_are_compared_in_constant_time(self):
        guarded, server, asked = self.server(token="s3cret"), self.server(), []
        sid, keys = server.session(("ada", "bob"))
        path, bob, compare = "/v1/sessions/" + sid, keys["bob"], hmac.compare_digest
        held = server.client().messages.send("c", "x")["id"]
        token = server.client().messages.lease("c", "w")[0]["leaseToken"]
        for target, *call in (
                (guarded, "GET", "/v1/stats", None, None, None, {"X-Api-Key": "s3cret"}),
                (server, "POST", path + "/join", None, "bob", bob),
                (server, "POST", path + "/messages", {"text": "x"}, "bob", bob),
                (server, "DELETE", path + "/agents/bob", None, "bob", bob),
                (server, "POST", "/api/messages/%d/ack" % held, {"leaseToken": token})):
            asked.clear()
            with patched(hmac, "compare_digest", lambda *two: asked.append(two) or compare(*two)):
                self.assertLess(target.call(*call).status, 300)
            self.assertTrue(asked, call)

    def test_a_limit_that_was_set_holds_for_everyone_else_loopback_is_spared(self):
        server = self.server(rate_limit=3)
        found = [self.health(server, X_Forwarded_For="203.0.113.%d" % n) for n in range(4)]
        self.assertEqual(found, [200, 200, 200, 429])       # nobody said --trust-proxy
        answer = server.call("GET", "/nowhere")
        self.expect(answer, 429, "rate_limit_exceeded")
        self.assertTrue(1 <= int(answer.headers["retry-after"]) <= 60)
        server.clock.advance(60)
        self.assertEqual(self.health(server), 200)
        server = self.server(trust_proxy=True)
        self.assertEqual((server.app.rate.limit, server.app.rate.seconds), (100, 60))
        server.app.rate.limit = 2
        self.assertEqual({self.health(server) for _ in range(5)}, {200})
        found = [self.health(server, X_Forwarded_For=address) for address in (
            "203.0.113.1", "6.6.6.6, 203.0.113.1", "7.7.7.7, 203.0.113.1", "203.0.113.2")]
        self.assertEqual(found, [200, 200, 429, 200])

    def test_an_open_door_to_the_network_must_be_meant(self):
        for host in ("0.0.0.0", "::", "192.0.2.1", ""):
            self.assertIn("token", self.fails("refused_to_start", Server, host=host))
        for settings in ({"token": "x"}, {"insecure": True}):
            self.assertEqual(self.health(self.server(host="0.0.0.0", **settings)), 200)

    def test_a_taken_port_and_a_bad_certificate_are_one_sentence(self):
        port = self.server().port
        self.assertIn("port %d" % port, self.fails("refused_to_start", Server, port=port))
        self.assertIn(__file__, self.fails("refused_to_start", Server, tls_cert=__file__))

    def test_keys_do_not_travel_in_clear_text_to_other_machines(self):
        def exchange(*_):
            raise nexus.NexusError("reached")
        with patched(nexus.Line, "exchange", exchange):
            for url, insecure, code in (
                    ("http://nexus.example", False, "insecure_transport"),
                    ("http://192.0.2.1:80", False, "insecure_transport"),
                    ("http://localhost.evil.example", False, "insecure_transport"),
                    ("http://127.0.0.1.evil.example", False, "insecure_transport"),
                    ("http://nexus.example", True, "reached"), ("http://[::1]", False, "reached"),
                    ("https://nexus.example", False, "reached"),
                    ("http://127.0.0.1:1", False, "reached")):
                self.fails(code, nexus.Client(url, token="t", insecure=insecure).stats)
                client = nexus.Client(url, insecure=insecure)
                self.fails(code, client.send, UNKNOWN, "ada", "x", session_key="k")
                for method, args in ((client.create, ()), (client.join, (UNKNOWN, "ada")),
                                     (client.claim, ("c", "ada"))):     # a key comes back
                    self.fails(code, method, *args)
                for method, args in ((client.status, (UNKNOWN,)), (client.pair, (UNKNOWN,)),
                                     (client.messages.lease, ("c", "w")),
                                     (client.send, (UNKNOWN, "ada", "x"))):
                    self.fails("reached", method, *args)

    def test_over_tls_a_client_trusts_its_authority_or_its_pin_and_nobody_else(self):
        if not shutil.which("openssl"):
            self.skipTest("openssl is not here")
        cert, key = make_certificate(self.folder())
        server = self.server(tls_cert=cert, tls_key=key)
        with open(cert, encoding="ascii") as file:
            pin = hashlib.sha256(nexus.ssl.PEM_cert_to_DER_cert(file.read())).hexdigest()
        colons = re.sub("(..)(?=.)", r"\1:", pin.upper())
        for options in ({"ca": cert}, {"pin": pin}, {"pin": colons}):
            client = server.client(**options)
            self.assertEqual(client.health()["status"], "healthy")
        with warnings.catch_warnings(record=True) as leaks:
            warnings.simplefilter("always")     # a socket that is not closed
            for options in ({}, {"pin": "0" * 64}, {"ca": "/no/such/file.pem"}):
                self.fails("wrong_certificate", server.client(sleep=lambda _: None,
                                                              **options).health)
            client.health()
            self.server().client().health()
            gc.collect()
        self.assertEqual([str(leak.message) for leak in leaks], [])
        self.assertNotIn(b" 200 ", server.raw(get("/health")))
        made = client.create(creator_agent_id="ada")
        waiting = Started(client.poll, made["sessionId"], "ada", wait=60)
        until(lambda: server.store.waiters.parked)
        client.send(made["sessionId"], "ada", "x", session_key=made["sessionKey"])
        self.assertEqual(waiting.result()["messages"][0]["text"], "x")
        self.assertTrue(client.pair(made["sessionId"])["url"].startswith(server.url + "/p/"))


# ----------------------------------------------------------------------------------------
# The store
#
# What was answered is on disk, what was refused left nothing, what is over is gone from the disk
# too; a file that is not ours is refused as it is.
# ----------------------------------------------------------------------------------------

class CommitTest(Case):

    def setUp(self):
        self.db = nexus.Database(":memory:")
        self.addCleanup(self.db.close)
        self.db.write(lambda db: db.execute("CREATE TABLE t (n INTEGER UNIQUE)"))

    def insert(self, number, then=None):
        """A job that inserts a number and then perhaps raises."""
        def job(db):
            db.execute("INSERT INTO t VALUES (?)", (number,))
            if then:
                raise then
            return number
        return job

    def together(self, *jobs):
        """What becomes of jobs that all wait for the same commit."""
        def outcome(job):
            try:
                return self.db.write(job)
            except Exception as trouble:
                return trouble
        calls = []
        with one_commit(self.db) as queued:
            for job in jobs:
                calls.append(Started(outcome, job))
                queued(len(calls))
        return [call.result() for call in calls]

    def numbers(self):
        return [number for number, in self.db.read("SELECT n FROM t ORDER BY n")]

    def test_writes_that_wait_together_share_a_commit(self):
        before = self.db.commits
        self.assertEqual(self.together(*map(self.insert, range(10))), list(range(10)))
        self.assertEqual((self.db.commits - before, self.numbers()), (1, list(range(10))))
        with patched(nexus, "MAX_BATCH", 4):
            self.assertEqual(self.together(*map(self.insert, range(10, 20))), list(range(10, 20)))

    def test_an_error_in_one_write_fails_that_write_alone(self):
        def refuse(_):
            raise nexus.NexusError("forbidden")
        found = self.together(self.insert(1), refuse, self.insert(2, ZeroDivisionError()),
                              self.insert(3), self.insert(1), self.insert(4))
        self.assertEqual([type(each).__name__ for each in found],
                         ["int", "NexusError", "ZeroDivisionError", "int", "IntegrityError", "int"])
        self.assertEqual(self.numbers(), [1, 3, 4])

    def test_a_write_refused_after_it_changed_something_is_taken_back(self):
        refusal = nexus.NexusError("forbidden")
        found = self.together(self.insert(1), self.insert(2, refusal), self.insert(3))
        self.assertEqual((found, self.numbers()), ([1, refusal, 3], [1, 3]))
        self.assertRaises(nexus.NexusError, self.db.write, self.insert(5, refusal))
        self.assertEqual((self.numbers(), self.db.write(self.insert(6))), ([1, 3], 6))

    def test_who_commits_for_others_is_relieved(self):
        calls = []

        def job(number):
            def run(_):
                if number == 99:
                    return until(calls[0].done)         # whoever came first has gone home
                calls.append(Started(self.db.write, job(number + 1)))
                until(lambda: self.db._queue)           # there is always more to do
            return run
        calls.append(Started(self.db.write, job(0)))
        until(lambda: len(calls) == 100, 30)
        for call in calls:
            call.result(30)


class FileTest(Case):

    def setUp(self):
        self.home = self.folder()
        self.path = os.path.join(self.home, "nexus.db")

    def files(self):
        """The bytes of every file in the folder, by name."""
        found = {}
        for name in os.listdir(self.home):
            with open(os.path.join(self.home, name), "rb") as file:
                found[name] = file.read()
        return found

    def refusal(self, path=None):
        """The sentence with which a file is refused; everything stays as it is."""
        before = self.files()
        with self.assertRaises(nexus.NexusError) as caught:
            Server(db=path or self.path)
        self.assertEqual(caught.exception.code, "storage_unavailable")
        self.assertTrue(self.files() == before, "the files were changed")
        return caught.exception.message

    def sql(self, script):
        connection = sqlite3.connect(self.path)
        connection.executescript(script)
        connection.close()

    def test_a_second_server_on_the_file_is_refused_and_told_who_has_it(self):
        server = self.server(db=self.path)
        self.assertIn("process %d" % os.getpid(), self.refusal())
        self.expect(server.call("PUT", "/v1/sessions"), 201)
        server.stop()
        self.expect(self.server(db=self.path).call("GET", "/health"), 200)

    def test_a_file_that_is_not_ours_is_refused_as_it_is(self):
        self.sql("CREATE TABLE customers (name)")
        self.assertRegex(self.refusal(), "another program.*Nothing was changed")
        self.sql("PRAGMA user_version=99; PRAGMA application_id=%d" % nexus.APPLICATION_ID)
        self.assertIn("newer nexus", self.refusal())
        with open(self.path, "wb") as file:
            file.write(b"Dear diary, " * 1000)
        self.assertRegex(self.refusal(), "not a database.*Nothing was changed")
        for path in (self.home, os.path.join(self.home, "no", "folder.db")):
            self.assertIn("--db", self.refusal(path))

    def test_a_damaged_database_is_refused_as_it_is(self):
        server = self.server(db=self.path)
        server.send(server.session()[0], "ada", "x" * 50000)
        server.stop()
        with open(self.path, "r+b") as file:
            file.seek(4096)
            file.write(b"\xa5" * (os.path.getsize(self.path) - 8192))
        self.assertRegex(self.refusal(), "damaged.*Nothing was changed")

    def test_an_older_schema_is_brought_up_to_date(self):
        self.sql(nexus.SCHEMA[0] + "PRAGMA user_version=1; PRAGMA application_id=%d;" % (
            nexus.APPLICATION_ID) + "INSERT INTO sessions (id, ttl, max_agents, created_at,"
            " expires_at, last_cursor) VALUES ('%s', 100, 5, 1, 1800000000000, 1);"
            "INSERT INTO agents VALUES (1, 'ada', x'00', 1, 1);"
            "INSERT INTO session_messages (place, id, agent_id, text, verified, created_at,"
            " expires_at, size)"
            " VALUES (4294967297, 'm', 'ada', 'here', 0, 1, 1800000000000, 4)" % UNKNOWN)
        server = self.server(db=self.path)
        self.assertEqual(texts(server.poll(UNKNOWN, "ada")), ["here"])
        self.expect(server.call("POST", "/api/messages/inbox/x/lease", {"consumer": "me"}), 200)
        self.assertEqual(server.store.db.read("PRAGMA user_version"), [(len(nexus.SCHEMA),)])

    @unittest.skipIf(os.name == "nt", "Windows has no modes")
    def test_files_are_for_their_owner_alone_under_any_umask(self):
        self.addCleanup(os.umask, os.umask(0))
        server = self.server(db=self.path)
        server.poll(server.session()[0], "ada")
        modes = {name: os.stat(os.path.join(self.home, name)).st_mode & 0o777
                 for name in os.listdir(self.home)}
        self.assertGreaterEqual(set(modes), {"nexus.db", "nexus.db-wal", "nexus.db-shm"})
        self.assertEqual(set(modes.values()), {0o600}, modes)
        server.stop()
        os.chmod(self.path, 0o644)              # it was there before us, and open to all
        self.server(db=self.path)
        self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o600)

    def test_a_full_disk_is_said_loses_nothing_and_is_recovered_from(self):
        server = self.server(db=self.path)
        (sid, _), db, sent = server.session(), server.store.db, []

        def send():
            return server.send(sid, "ada", "x" * 3000)

        def limit(more):
            with db._writer_lock:
                pages, = db._writer.execute("PRAGMA page_count").fetchone()
                db._writer.execute("PRAGMA max_page_count=%d" % (pages + more))
        limit(5)
        answer = send()
        while answer.status == 201 and len(sent) < 20:
            sent.append(answer.json["id"])
            answer = send()
        self.expect(answer, 503, "storage_unavailable")
        self.assertGreater(int(answer.headers["retry-after"]), 0)
        found = server.poll(sid, "ada").json["messages"]
        self.assertEqual([each["id"] for each in found], sent)
        server.sweep()
        limit(1000)
        sent.append(self.expect(send(), 201)["id"])
        found = server.poll(sid, "ada").json["messages"]
        self.assertEqual([(each["id"], int(each["cursor"])) for each in found],
                         [(message_id, n + 1) for n, message_id in enumerate(sent)])

    def test_deleted_means_gone_from_file_and_log(self):
        server = self.server(db=self.path)
        sid, keys = server.session(("ada-of-old", "bob-of-old"), ttl=10, greeting="old greeting")
        key = keys["ada-of-old"]
        code = server.call("PUT", "/v1/pair", {"sessionId": sid}).json["code"]
        for number in range(30):
            server.send(sid, "ada-of-old", "old words %d" % number, key)
        secrets = [code.encode(), key.encode(), bytes.fromhex(key)]
        traces = [text.encode() for text in ("old words", "ada-of-old", "bob-of-old",
                                             "old greeting", sid)]
        pragmas = ("journal_mode", "synchronous", "secure_delete")
        self.assertEqual([server.store.db._writer.execute("PRAGMA " + name).fetchone()[0]
                          for name in pragmas], ["wal", 2, 1])
        everything = b"".join(self.files().values())
        self.assertEqual([each in everything for each in secrets + traces],
                         [False] * 3 + [True] * 5)
        for seconds in (10, nexus.SCRUB_SECONDS):
            server.clock.advance(seconds)
            server.sweep()
        everything = b"".join(self.files().values())
        self.assertEqual([each for each in traces if each in everything], [])

    def test_whatever_is_deleted_leaves_the_log_too(self):
        server = self.server(db=self.path)
        sid, _ = server.session(ttl=100)
        messages = server.client().messages
        for way, seconds, put in (
                ("ttl of a message", 10, lambda mark: messages.send("c", mark, ttl_seconds=10)),
                ("gc", 0, lambda mark: messages.ack(messages.send("c", mark)["id"])),
                ("end of a message", 100, lambda mark: server.send(sid, "ada", mark)),
                ("end of a session", 10, lambda mark: server.session(ttl=10, greeting=mark))):
            server.clock.advance(nexus.SCRUB_SECONDS)
            server.sweep()                  # nothing is left to do from before
            mark = "mark-" + os.urandom(8).hex()
            put(mark)
            server.clock.advance(seconds - 1 if seconds else 0)
            server.poll(sid, "ada")         # this session goes on
            server.clock.advance(1 if seconds else 0)
            messages.gc(0)
            for pause in (0, nexus.SCRUB_SECONDS):
                server.clock.advance(pause)
                server.sweep()
            found = [name for name, data in self.files().items() if mark.encode() in data]
            self.assertEqual(found, [], way)


# ----------------------------------------------------------------------------------------
# The disk
#
# Files that others could read or have put there, disks that are full, lie about a sync or lose a
# file, readers that never end, backups that are cut off: every promise of the store holds.
# ----------------------------------------------------------------------------------------

MODES = os.name == "posix"
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"


class DiskCase(Case):
    """A test with a folder, self.home, and a database's name in it, self.path."""

    def setUp(self):
        self.home = self.folder()
        self.path = os.path.join(self.home, "x.db")

    def send(self, server, content="x"):
        """The status of one send to the channel c."""
        return server.call("POST", "/api/messages", {"channel": "c", "content": content}).status

    def filled(self, *contents):
        """The path of a database of ours, closed, with these messages."""
        with Server(db=self.path) as server:
            for content in contents:
                self.assertEqual(self.send(server, content), 201)
        return self.path

    def contents(self, path=None):
        """What a server on the database finds in the channel c."""
        with Server(db=path or self.path) as server:
            return [row["content"] for row in server.client().messages.inbox("c")]

    def modes(self):
        return {name: oct(os.stat(os.path.join(self.home, name)).st_mode & 0o777)
                for name in os.listdir(self.home)}

    def refused(self, path=None):
        """The sentence with which a server on this file is refused."""
        with self.assertRaises(nexus.NexusError) as caught:
            Server(db=path or self.path)
        self.assertEqual(caught.exception.code, "storage_unavailable")
        return caught.exception.message

    def written(self, name, content=b""):
        """Write a file into the folder; its path."""
        path = os.path.join(self.home, name)
        with open(path, "wb") as file:
            file.write(content)
        return path

    def read(self, path):
        with open(path, "rb") as file:
            return file.read()


@unittest.skipUnless(MODES, "Windows has neither modes nor links for everybody")
class PrivateFiles(DiskCase):

    def crashed(self):
        """A database whose server was killed: its log is still there. All are open to others."""
        with Server(db=self.path) as server:
            self.send(server, "in the log")
            for name in ("x.db", "x.db-wal"):
                shutil.copy(os.path.join(self.home, name), os.path.join(self.home, "y" + name[1:]))
        os.unlink(self.path)
        self.path = os.path.join(self.home, "y.db")
        for name in os.listdir(self.home):
            os.chmod(os.path.join(self.home, name), 0o644)

    def test_what_others_could_read_is_closed_to_them_before_sqlite_opens_it(self):
        self.crashed()
        seen = []
        with between(sqlite3, "connect", lambda: seen.append(self.modes()), before=True):
            server = self.server(db=self.path)
        self.assertEqual(seen, [dict.fromkeys(("y.db", "y.db-wal", "y.db.lock"), "0o600")])
        self.assertEqual(set(self.modes().values()), {"0o600"})
        self.assertEqual([row["content"] for row in server.client().messages.inbox("c")],
                         ["in the log"])

    def test_an_old_lock_an_empty_file_and_a_database_without_tables_become_private_too(self):
        for script in ("", "VACUUM; PRAGMA user_version=0;"):
            sqlite3.connect(self.written("x.db")).executescript(script).connection.close()
            self.written("x.db.lock", b"77\n")
            for name in os.listdir(self.home):
                os.chmod(os.path.join(self.home, name), 0o666)
            seen = []
            with between(sqlite3, "connect", lambda: seen.append(self.modes()), before=True):
                server = self.server(db=self.path)
            self.assertEqual(seen[0]["x.db.lock"], "0o600")
            self.assertEqual(seen[0]["x.db"], "0o666" if script else "0o600")   # is it ours?
            self.assertEqual(self.send(server), 201)
            self.assertEqual(set(self.modes().values()), {"0o600"})
            server.stop()

    def test_the_file_of_another_program_stays_as_it_is(self):
        with contextlib.closing(sqlite3.connect(self.path)) as other:
            other.executescript("CREATE TABLE customers (name); PRAGMA journal_mode=WAL;")
            other.execute("INSERT INTO customers VALUES ('ada')")
            other.commit()
            for name in os.listdir(self.home):
                os.chmod(os.path.join(self.home, name), 0o644)
            self.assertIn("another program", self.refused())
            self.assertEqual(self.modes(), dict.fromkeys(("x.db", "x.db-wal", "x.db-shm"), "0o644"))

    def test_no_link_is_followed_where_we_create_something(self):
        victim = self.written("victim", b"precious")
        lock = self.path + ".lock"
        for make in (os.symlink, os.link):
            make(victim, lock)
            self.assertIn(lock, self.refused())
            os.unlink(lock)
        os.symlink(os.path.join(self.home, "nowhere"), self.path)
        self.assertIn("No such file", self.refused())
        os.unlink(self.path)
        os.symlink(self.written("empty"), self.path)
        self.assertIn("symbolic link", self.refused())
        os.unlink(self.path)
        os.symlink(victim, self.filled("x") + "-wal")
        self.assertIn(self.path + "-wal", self.refused())
        self.assertEqual((self.read(victim), os.path.exists(os.path.join(self.home, "nowhere")),
                          self.read(os.path.join(self.home, "empty"))), (b"precious", False, b""))

    def test_a_link_to_a_database_of_ours_is_that_database(self):
        link = os.path.join(self.home, "link.db")
        os.symlink(self.filled("here"), link)
        self.assertEqual(self.contents(link), ["here"])
        self.assertFalse(os.path.exists(link + ".lock"))

    def test_a_lock_whose_file_its_owner_has_just_removed_is_made_anew(self):
        first = nexus.FileLock(self.path)
        with between(os, "fstat", first.release):       # after the second one opened the same file
            second = nexus.FileLock(self.path)
        self.assertTrue(second.held())
        with self.assertRaises(nexus.NexusError):
            nexus.FileLock(self.path)
        second.release()
        self.assertEqual(os.listdir(self.home), [])

    def test_a_file_that_is_no_lock_is_not_emptied(self):
        lock = self.written("x.db.lock", b"{'packages': %d}" % 10 ** 30)
        self.assertIn("no lock of nexus", self.refused())
        self.assertEqual(len(self.read(lock)), 45)

    @unittest.skipUnless(MODES and os.geteuid() == 0, "only root can give files away")
    def test_a_log_that_somebody_else_has_put_there_is_refused(self):
        wal = self.filled("x") + "-wal"
        self.written("x.db-wal")
        os.chown(wal, 12345, 12345)
        self.assertIn("somebody else's", self.refused())

    def test_create_private_takes_no_name_that_is_taken(self):
        self.addCleanup(os.umask, os.umask(0))
        os.close(nexus.create_private(self.path))
        self.assertEqual(self.modes(), {"x.db": "0o600"})
        os.symlink(os.path.join(self.home, "nowhere"), os.path.join(self.home, "link"))
        for name, fresh in (("x.db", os.O_EXCL), ("link", os.O_EXCL), ("link", 0)):
            for missing in ("nothing", "O_NOFOLLOW"):   # as on Windows
                with contextlib.ExitStack() as stack:
                    if hasattr(os, missing):
                        stack.enter_context(patched(os, missing, 0))
                    with self.assertRaises(FileExistsError):
                        nexus.create_private(os.path.join(self.home, name), fresh)


class TakenAway(DiskCase):
    """Database and lock vanish under a running server."""

    @unittest.skipUnless(MODES, "Windows does not remove open files")
    def test_who_lost_its_lock_writes_nothing_more_and_leaves_the_next_ones_alone(self):
        first = self.server(db=self.path)
        self.assertEqual(self.send(first, "one"), 201)
        os.unlink(self.path + ".lock")
        self.expect(first.call("POST", "/api/messages", {"channel": "c", "content": "two"}), 503,
                    "storage_unavailable")
        second = self.server(db=self.path)
        self.assertEqual(self.send(second, "three"), 201)
        self.assertEqual(self.send(first, "four"), 503)         # there is a lock, but not its own
        first.stop()
        self.assertTrue(os.path.exists(self.path + ".lock"))
        self.assertIn("process %d" % os.getpid(), self.refused())
        self.assertEqual(self.send(second, "five"), 201)
        second.stop()
        self.assertEqual(os.listdir(self.home), ["x.db"])
        self.assertEqual(self.contents(), ["one", "three", "five"])

    @unittest.skipUnless(MODES, "Windows does not rename open files")
    def test_a_renamed_database_is_noticed_by_the_next_send_and_by_health(self):
        server, away = self.server(db=self.path), self.path + ".away"
        for replaced in (False, True):
            os.rename(self.path, away)
            if replaced:
                shutil.copy(away, self.path)        # another file of the same name
            found = server.call("GET", "/health")
            self.assertEqual((found.status, found.json["status"]), (503, "degraded"))
            self.assertIn("removed or replaced", found.json["reason"])
            self.assertEqual(self.send(server), 503)
            os.replace(away, self.path)
            server.store.tend()
            self.assertEqual(server.call("GET", "/health").status, 200)
            self.assertEqual(self.send(server), 201)
            server.store.tend()
        lines, server.lines[:] = list(server.lines), []
        self.assertEqual(["replaced" in line for line in lines], [True, False] * 2)

    def test_a_commit_of_nothing_is_not_counted(self):
        server = self.server(db=self.path)
        before = server.call("GET", "/v1/stats").json["commits"]
        for _ in range(3):
            server.sweep()
        self.assertEqual(server.call("GET", "/v1/stats").json["commits"], before)
        self.assertEqual(self.send(server), 201)
        self.assertEqual(server.call("GET", "/v1/stats").json["commits"], before + 1)


class Health(DiskCase):
    """/health, /metrics and the log tell what senders know already."""

    def figures(self, server):
        return {name: int(float(value)) for name, value in re.findall(
            r"(?m)^nexus_(storage_ok|storage_errors|disk_free_bytes) (\S+)$",
            server.call("GET", "/metrics").text)}

    def limit(self, server, more):
        """Let the database grow by so many pages only: a full disk."""
        def job(db):
            pages, = db.execute("PRAGMA page_count").fetchone()
            db.execute("PRAGMA max_page_count=%d" % (pages + more))
        db = server.store.db
        with db._writer_lock:
            job(db._writer)

    def test_a_full_disk_is_told_by_health_figures_and_log_until_it_is_over(self):
        server = self.server(db=self.path)
        well = server.call("GET", "/health")
        self.assertEqual((well.status, well.json["status"]), (200, "healthy"))
        self.assertEqual(self.figures(server)["storage_ok"], 1)
        self.assertGreater(self.figures(server)["disk_free_bytes"], 10 ** 6)
        self.limit(server, 1)
        self.assertEqual(self.send(server, "x" * 90000), 503)
        ill = server.call("GET", "/health")
        self.assertEqual((ill.status, ill.json["status"], ill.json["version"]),
                         (503, "degraded", nexus.VERSION))
        self.assertIn("database or disk is full", ill.json["reason"])
        self.assertEqual(set(ill.json), set(well.json) | {"reason"})
        document = server.call("GET", "/openapi.json").json
        for name, value in (("Health", ill.json), ("Stats", server.call("GET", "/v1/stats").json)):
            schema = nexus.shape_schema(nexus.SHAPES[name])
            self.assertEqual(misfits(value, schema, document), [])
            self.assertLessEqual(set(value), set(schema["properties"]))
        for _ in range(3):
            server.store.tend()                     # tries to write, in vain
        self.assertEqual(self.figures(server)["storage_ok"], 0)
        self.assertGreaterEqual(self.figures(server)["storage_errors"], 4)
        self.assertEqual(len(server.lines), 1, server.lines)
        self.assertIn("disk is full", server.lines.pop())
        self.limit(server, 1000)                    # nobody sends: the next run finds out
        for _ in range(3):
            server.store.tend()
        self.assertEqual(server.call("GET", "/health").json["status"], "healthy")
        self.assertEqual(self.figures(server)["storage_ok"], 1)
        self.assertEqual(len(server.lines), 1, server.lines)
        self.assertIn("over", server.lines.pop())
        self.assertEqual(server.store.db.read("SELECT COUNT(*) FROM counters WHERE name = 'probe'"),
                         [(0,)])

    def test_in_trouble_the_log_gives_its_room_back(self):
        server = self.server(db=self.path)
        self.assertEqual(self.send(server, "x" * 900000), 201)
        server.store.db.unscrubbed, server.store.db.fault = False, "The disk is full."
        self.assertGreater(os.path.getsize(self.path + "-wal"), 900000)
        server.store.tend()
        self.assertLess(os.path.getsize(self.path + "-wal"), 2 * nexus.PROBE_BYTES)
        self.assertIsNone(server.store.trouble())

    def test_trouble_that_is_over_before_anybody_looked_is_told_all_the_same(self):
        server = self.server(db=self.path)
        self.limit(server, 1)
        self.assertEqual(self.send(server, "x" * 90000), 503)
        self.limit(server, 1000)
        self.assertEqual(self.send(server, "x" * 90000), 201)
        self.assertEqual(server.call("GET", "/health").status, 200)
        for _ in range(3):
            server.store.tend()
        lines, server.lines[:] = list(server.lines), []
        self.assertEqual(["full" in line for line in lines], [True, False])

    def test_a_commit_of_nothing_says_nothing_of_the_disk(self):
        server = self.server()
        server.store.db.fault = "the disk is full"
        server.store.db.write(lambda db: None)
        self.assertEqual(server.call("GET", "/health").json["reason"], "the disk is full")
        self.assertEqual(self.send(server), 201)
        self.assertEqual(server.call("GET", "/health").status, 200)

    def test_an_expiry_run_that_fails_is_told_until_one_succeeds(self):
        server = self.server()
        with patched(server.store.sessions, "write_activity", refusing(ZeroDivisionError())):
            for _ in range(3):
                server.store.tend()
        self.assertIn("ZeroDivisionError", server.call("GET", "/health").json["reason"])
        self.assertEqual(self.figures(server), {"storage_ok": 0, "storage_errors": 0})
        server.store.tend()
        self.assertEqual(server.call("GET", "/health").status, 200)
        lines, server.lines[:] = list(server.lines), []
        self.assertEqual(["fault of the server" in line for line in lines], [True, False])

    def test_a_sync_that_fails_in_a_commit_is_the_disks_fault_and_no_fault_of_ours(self):
        server = self.server(db=self.path)
        broken = refusing(sqlite3.OperationalError("disk I/O error"))
        with patched(server.store.db, "missing", broken):
            self.assertEqual(self.send(server), 503)
        self.assertIn("disk I/O error", server.call("GET", "/health").json["reason"])
        self.assertEqual(self.send(server), 201)
        self.assertEqual(server.call("GET", "/health").status, 200)

    @unittest.skipUnless(MODES and os.geteuid() == 0 and shutil.which("mount"), "needs root")
    def test_a_real_disk_that_is_full_and_empty_again_loses_nothing(self):
        if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", self.home],
                           stderr=subprocess.DEVNULL):
            self.skipTest("cannot mount a small disk here")
        self.addCleanup(subprocess.call, ["umount", self.home])
        server, kept, refused = self.server(db=self.path), [], 0
        for turn in range(3):
            with open(os.path.join(self.home, "junk"), "wb", 0) as junk:
                with contextlib.suppress(OSError):
                    while junk.write(b"x" * 4096):
                        pass
            for number in range(30):
                content = "%d %d " % (turn, number) + "x" * 9000
                status = self.send(server, content)
                self.assertIn(status, (201, 503))
                if status == 201:
                    kept.append(content)
            self.assertEqual(server.call("GET", "/health").status, 503 if status == 503 else 200)
            server.store.tend()
            os.unlink(os.path.join(self.home, "junk"))
            server.store.tend()
            server.store.tend()
            self.assertEqual(server.call("GET", "/health").status, 200)
            self.assertEqual(self.send(server, "after %d" % turn), 201)
            kept.append("after %d" % turn)
        self.assertEqual(["full" in line for line in server.lines], [True, False] * 3)
        server.lines.clear()
        server.stop()
        self.assertEqual(self.contents(), kept)


class Readers(DiskCase):
    """Reading connections are few, go round, and stand still while the log is emptied."""

    def setUp(self):
        super().setUp()
        self.db = nexus.Database(self.path)
        self.addCleanup(lambda: self.db and self.db.close())
        self.db.write(lambda db: db.execute("INSERT INTO counters VALUES ('x', 1)"))

    def held(self, count):
        """That many reads that go on until the event is set: (the event, the reads)."""
        fetch, inside, go_on = nexus.Database._fetch, [], threading.Event()

        def slow(connection, *arguments):
            connection.execute("BEGIN").execute("SELECT * FROM counters").fetchall()
            inside.append(connection)
            go_on.wait(10)
            connection.execute("COMMIT")
            return fetch(connection, *arguments)
        with patched(nexus.Database, "_fetch", staticmethod(slow)):
            reads = [Started(self.db.read, "SELECT 1") for _ in range(count)]
            until(lambda: len(inside) == min(count, nexus.READERS))
        self.addCleanup(go_on.set)
        return go_on, reads

    def test_more_readers_than_connections_wait_for_each_other(self):
        with patched(sqlite3, "connect", refusing(sqlite3.OperationalError("unable to open"))):
            go_on, reads = self.held(50)
            late = Started(self.db.read, "SELECT 2")
            time.sleep(0.02)
            self.assertEqual(sum(read.done() for read in reads + [late]), 0)
            go_on.set()
            self.assertEqual([read.result() for read in reads], [[(1,)]] * 50)
            self.assertEqual(late.result(), [(2,)])

    def test_who_waits_too_long_is_told_that_the_server_is_busy(self):
        go_on, reads = self.held(nexus.READERS)
        self.db._patience = 0.05
        with self.assertRaises(nexus.NexusError) as caught:
            self.db.read("SELECT 1")
        self.assertEqual((caught.exception.code, dict(caught.exception.headers)),
                         ("server_busy", {"Retry-After": "1"}))
        go_on.set()
        self.assertEqual([read.result() for read in reads], [[(1,)]] * nexus.READERS)
        self.assertEqual(self.db.read("SELECT 1"), [(1,)])      # who left the queue left no place
        self.assertEqual(self.db.errors, 0)

    def test_readers_that_overlap_without_end_cannot_keep_content_in_the_log(self):
        fetch, ends, begun = nexus.Database._fetch, threading.Event(), [0]

        def overlapping(connection, *arguments):
            connection.execute("BEGIN").execute("SELECT * FROM counters").fetchall()
            begun[0] += 1
            mine, patience = begun[0], time.monotonic() + 0.2
            while begun[0] == mine and not ends.is_set() and time.monotonic() < patience:
                time.sleep(0.001)               # read until the next one has begun
            connection.execute("COMMIT")
            return fetch(connection, *arguments)

        def forever():
            while not ends.is_set():
                self.db.read("SELECT 1")
        with patched(nexus.Database, "_fetch", staticmethod(overlapping)):
            readers = [Started(forever) for _ in range(3)]
            until(lambda: begun[0] > 10)
            try:
                found = [self.db.scrub() for _ in range(3)]
            finally:
                ends.set()
            for reader in readers:
                reader.result()
        self.assertEqual((found, os.path.getsize(self.path + "-wal")), ([True] * 3, 0))

    def test_a_read_that_does_not_end_is_broken_off_and_told_why(self):
        with patched(nexus, "LONGEST_READ", 0.05):
            read = Started(self.db.read, ENDLESS)
            until(lambda: len(self.db._readers._free) < nexus.READERS)
            self.assertTrue(self.db.scrub())
        with self.assertRaisesRegex(nexus.NexusError, "too long") as caught:
            read.result()
        self.assertEqual(caught.exception.code, "server_busy")
        self.assertEqual((self.db.errors, len(self.db._readers._free)), (0, nexus.READERS))

    def test_while_another_program_reads_the_log_stays_and_senders_do_not_wait(self):
        with contextlib.closing(sqlite3.connect(self.path)) as other:
            other.execute("BEGIN")
            other.execute("SELECT * FROM counters").fetchall()
            self.db.write(lambda db: db.execute("UPDATE counters SET value = 2"))
            began = time.monotonic()
            self.assertFalse(self.db.scrub())
            self.assertLess(time.monotonic() - began, nexus.BUSY_SECONDS / 2)
        self.assertTrue(self.db.scrub())
        self.assertEqual(self.db._writer.execute("PRAGMA busy_timeout").fetchone(),
                         (nexus.BUSY_SECONDS * 1000,), "a write waits for others as before")

    def test_close_closes_connections_in_use(self):
        read = Started(self.db.read, ENDLESS)
        until(lambda: len(self.db._readers._free) < nexus.READERS)
        self.db.close()
        with self.assertRaises(nexus.NexusError):
            read.result()
        for connection in self.db._connections:
            with self.assertRaises(sqlite3.ProgrammingError):
                connection.execute("SELECT 1")
        began = time.monotonic()
        with self.assertRaises(nexus.NexusError) as caught:
            self.db.read("SELECT 1")
        self.assertEqual(caught.exception.code, "server_busy")
        self.assertLess(time.monotonic() - began, nexus.BUSY_SECONDS / 2)
        self.db = None

    def test_the_connection_that_was_used_last_is_used_next_and_all_go_before_one(self):
        broken_off = []

        class Borrowed(str):
            def interrupt(self):
                broken_off.append(self)
                if self in out:
                    out.remove(self)
                    pool.give(self)
        a, b, c = everything = [Borrowed(name) for name in "abc"]
        pool, out = nexus.Pool(everything), []
        self.assertEqual((pool.take(0), pool.take(0)), ([c], [b]))
        pool.give(c)
        self.assertEqual((pool.take(0), pool.take(0), pool.take(0.01)), ([c], [a], []))
        one = Started(pool.take, 10)
        until(lambda: len(pool._queue) == 1)
        every = Started(pool.take, 0.2, 3)
        until(lambda: len(pool._queue) == 2)
        pool.give(b)
        pool.give(c)
        out.append(a)                               # this one has to be broken off
        self.assertEqual((every.result(), one.done(), broken_off), ([b, c, a], False, everything))
        pool.give(c)
        self.assertEqual(one.result(), [c])
        pool.give(b)
        pool.give(a)
        self.assertEqual((pool.take(0), pool.take(0)), ([a], [b]))
        self.assertEqual(len(pool._queue), 0)
        waiting = 1, [], threading.Lock()
        waiting[2].acquire()
        pool._queue.append(waiting)                 # somebody waits for c, which is on its way back
        pool._free.append(c)
        self.assertEqual((pool.take(0.01), waiting[1]), ([], [c]))

    def test_no_write_is_broken_off_with_the_reads(self):
        read = Started(self.db.read, ENDLESS)
        until(lambda: len(self.db._readers._free) < nexus.READERS)
        running = threading.Event()

        def job(db):
            running.set()
            return db.execute(ENDLESS.replace("FROM n)", "FROM n WHERE i < 2000000)")).fetchone()
        write = Started(self.db.write, job)
        self.assertTrue(running.wait(10))
        with patched(nexus, "LONGEST_READ", 0.01):
            self.assertTrue(self.db.scrub())
        self.assertEqual(write.result(), (2000000,))
        self.assertRaises(nexus.NexusError, read.result)

    @unittest.skipUnless(os.path.exists("/proc/self/io"), "this system does not count what is read")
    def test_a_start_does_not_read_the_file(self):
        self.db.write(lambda db: db.executemany(
            "INSERT INTO messages (channel, sender, wire, size, created_at)"
            " VALUES ('c', '', ?, 1, 1)", (("x" * 100000,) for _ in range(200))))
        self.db.close()

        def count():
            return int(re.search(rb"rchar: (\d+)", self.read("/proc/self/io"))[1])
        before = count()
        self.db = nexus.Database(self.path)
        self.assertLess(count() - before, 10 ** 6)

    @unittest.skipUnless(MODES, "Windows does not limit descriptors")
    def test_reading_goes_on_when_there_are_no_descriptors_left(self):
        import resource
        limits, taken = resource.getrlimit(resource.RLIMIT_NOFILE), []
        highest = os.dup(0)
        os.close(highest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, limits[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            go_on, reads = self.held(50)
            go_on.set()
            self.assertEqual([read.result() for read in reads], [[(1,)]] * 50)
            self.db.write(lambda db: db.execute("UPDATE counters SET value = 3"))
            self.assertTrue(self.db.scrub())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for file in taken:
                os.close(file)

    def test_sqlite_moves_nothing_from_the_log_by_itself(self):
        size = os.path.getsize(self.path)
        for _ in range(3):
            self.db.write(lambda db: db.execute(
                "INSERT INTO messages (channel, sender, wire, size, created_at)"
                " VALUES ('c', '', zeroblob(3000000), 1, 1)"))
        self.assertEqual(os.path.getsize(self.path), size)
        self.assertGreater(self.db.wal_bytes(), 9000000)

    def test_a_table_whose_first_page_is_damaged_is_found_at_the_start(self):
        self.db.close()
        self.db = None
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            page, = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'codes'").fetchone()
        with open(self.path, "r+b") as file:
            file.seek((page - 1) * 4096)
            file.write(b"\xa5" * 4096)
        self.assertRegex(self.refused(), "damaged.*Nothing was changed.*nexus.py restore")

    def test_a_start_reads_no_more_than_the_first_pages(self):
        self.db.write(lambda db: db.executemany(
            "INSERT INTO messages (channel, sender, wire, size, created_at)"
            " VALUES (?, '', ?, 1, 1)", (("c%d" % (number % 2), '"content":"%s"}' % ("x" * 3000))
                                         for number in range(99))))
        self.db.close()
        self.db = None
        with open(self.path, "r+b") as file:
            file.seek(os.path.getsize(self.path) // 8192 * 4096)
            file.write(b"\xa5" * 8192)              # two pages in the middle, one of each
        with Server(db=self.path) as server:
            self.assertEqual(self.send(server), 201)
            found = server.call("GET", "/api/messages/inbox/c1?limit=1000")
            self.assertEqual(self.expect(found, 503, "storage_unavailable")["error"],
                             "storage_unavailable")
            self.assertRegex(found.json["message"], "damaged.*restore.*malformed")
            server.store.tend()
            self.assertIn("damaged", server.lines.pop())
            server.store.tend()
            self.assertIn("over", server.lines.pop())
        ran = run_here(self.home, "backup", "copy.db", "--db", self.path)
        self.assertEqual((ran.code, ran.json["error"]), (1, "backup_failed"))
        self.assertIn("damaged", ran.json["message"])


SHIM = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

/* Some syncs of a database, SHIM_DB, and of its log fail, and what they covered is forgotten, as
   kernels do it: a page is dirty from a write to the next sync, and only a sync that succeeds
   carries it over to SHIM_DB.disk and SHIM_DB-wal.disk, which is what a power cut would leave. */
enum { PAGE = 4096, PAGES = 65536 };
static unsigned char dirty[2][PAGES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static char *name_of(int which, const char *end) {
    static __thread char name[4096];
    snprintf(name, sizeof name, "%s%s%s", getenv("SHIM_DB"), which ? "-wal" : "", end);
    return name;
}

static int which_is(int file) {
    struct stat one, other;
    for (int which = 0; !fstat(file, &one) && which < 2; which++)
        if (!stat(name_of(which, ""), &other)
            && one.st_dev == other.st_dev && one.st_ino == other.st_ino) return which;
    return -1;
}

static int carry(int which, int from, int fails) {
    char page[PAGE];
    int disk = open(name_of(which, ".disk"), O_WRONLY);
    for (long number = 0; number < PAGES; number++) {
        ssize_t got = dirty[which][number] && !fails ? pread(from, page, PAGE, PAGE * number) : 0;
        if (got > 0 && pwrite(disk, page, got, PAGE * number) != got) abort();
        dirty[which][number] = 0;
    }
    return close(disk);
}

static int synced(int file, const char *name) {
    static unsigned seed;
    int which = which_is(file);
    if (which < 0) return ((int (*)(int)) dlsym(RTLD_NEXT, name))(file);
    pthread_mutex_lock(&lock);
    if (!seed) seed = atoi(getenv("SHIM_SEED"));
    int fails = rand_r(&seed) % 100 < atoi(getenv("SHIM_PERCENT"));
    carry(which, file, fails);
    pthread_mutex_unlock(&lock);
    errno = EIO;
    return fails ? -1 : 0;
}

static ssize_t wrote(int file, ssize_t count, off_t at) {
    int which = which_is(file);
    if (count > 0 && which >= 0) {
        pthread_mutex_lock(&lock);
        for (long number = at / PAGE; number <= (at + count - 1) / PAGE; number++)
            dirty[which][number] = 1;
        pthread_mutex_unlock(&lock);
    }
    return count;
}

static int cut(int file, int result, off_t size) {
    int which = which_is(file);
    if (!result && which >= 0 && truncate(name_of(which, ".disk"), size)) abort();
    return result;
}

#define WRITES(name) ssize_t name(int file, const void *data, size_t count, off_t at) { \
    ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, #name); \
    return wrote(file, real(file, data, count, at), at); }
#define CUTS(name) int name(int file, off_t size) { \
    int (*real)(int, off_t) = dlsym(RTLD_NEXT, #name); \
    return cut(file, real(file, size), size); }
WRITES(pwrite)
WRITES(pwrite64)
CUTS(ftruncate)
CUTS(ftruncate64)
int fsync(int file) { return synced(file, "fsync"); }
int fdatasync(int file) { return synced(file, "fdatasync"); }
'''

# serve, with a log that is emptied every tenth of a second, and what {0} does besides.
HASTY = """
import sys; sys.path.insert(0, {1!r})
import nexus
nexus.SWEEP_SECONDS, nexus.SCRUB_SECONDS, nexus.WAL_BYTES = 0.03, 0.1, 200000
{0}
sys.exit(nexus.main())
"""


class FailedSyncs(DiskCase):
    """A disk that could not sync what was written, and says the next time that all is well."""

    def serve(self, extra="", **environ):
        """A server process with a hasty log: (process, url); its stderr is in the folder."""
        with open(os.path.join(self.home, "stderr"), "wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-S", "-c", HASTY.format(extra, FOLDER), "serve", "--port", "0",
                 "--quiet", "--db", self.path], stdout=subprocess.PIPE, stderr=errors,
                env=clean_environment(self.home, **environ))
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        self.addCleanup(process.stdout.close)
        line = process.stdout.readline()            # none if it ends before that
        return process, json.loads(line.decode())["url"] if line else None

    def test_a_failed_checkpoint_ends_the_server_and_none_is_tried_again(self):
        spoiled = """
connect = nexus.sqlite3.connect
class Spoiled(nexus.sqlite3.Connection):
    def execute(self, sql, *arguments):
        if "wal_checkpoint" in sql and nexus.os.path.getsize({1!r}):
            with open({0!r}, "a") as file:
                file.write(sql + ";")
            raise nexus.sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *arguments)
nexus.sqlite3.connect = lambda *a, **k: connect(*a, factory=Spoiled, **k)
nexus.WAL_BYTES = 0
""".format(os.path.join(self.home, "tried"), self.path + "-wal")
        self.filled("first")                        # so that its log is empty at the start
        for stop in (False, True):                  # in an expiry run, and at the very end
            process, url = self.serve(spoiled + "nexus.SWEEP_SECONDS = %s" % (60 if stop else 0.1))
            with contextlib.suppress(nexus.NexusError):     # it may end before it can answer
                nexus.Client(url, patience=-1).messages.send("c", "kept %s" % stop)
            if stop:
                process.terminate()
            self.assertEqual(process.wait(20), 1)
            tried = self.read(os.path.join(self.home, "tried")).decode()
            self.assertEqual(tried.count("checkpoint"), 1, tried)
            os.unlink(os.path.join(self.home, "tried"))
            said = self.read(os.path.join(self.home, "stderr")).decode()
            self.assertEqual(said.count("\n"), 1, said)
            self.assertRegex(said, r"disk I/O error.*start it again")
            self.assertNotIn("fault of the server", said)
            self.assertGreater(os.path.getsize(self.path + "-wal"), 0)
            process, url = self.serve()
            kept = [row["content"] for row in nexus.Client(url).messages.inbox("c")]
            self.assertIn("kept %s" % stop, kept)
            process.terminate()
            self.assertEqual(process.wait(20), 0)

    def test_nothing_is_written_behind_what_a_crash_left_in_the_log(self):
        saved = self.folder()
        with Server(db=self.path) as server:
            self.assertEqual(self.send(server, "before the crash"), 201)
            for name in ("x.db", "x.db-wal"):
                shutil.copy(os.path.join(self.home, name), saved)
        path = os.path.join(saved, "x.db")
        self.assertGreater(os.path.getsize(path + "-wal"), 0)
        server = self.server(db=path)
        self.assertEqual(os.path.getsize(path + "-wal"), 0)
        self.assertIn(b"before the crash", self.read(path))
        full = refusing(nexus.storage_error("database or disk is full"))
        with patched(nexus.Database, "_checkpoint", full):      # then it starts all the same
            self.contents()

    def test_a_lock_that_was_left_behind_says_who_has_it_now(self):
        lock = self.written("x.db.lock", b"1234567890123\n")
        self.server(db=self.path)
        self.assertEqual(self.read(lock), b"%d\n" % os.getpid())

    def test_a_file_that_is_none_any_more_is_called_damaged(self):
        for words in ("database disk image is malformed", "file is not a database"):
            self.assertIn("nexus.py restore", nexus.storage_error(sqlite3.DatabaseError(
                words)).message)

    def test_a_full_disk_in_a_checkpoint_is_no_reason_to_end(self):
        database = nexus.Database(self.path)
        self.addCleanup(database.close)
        for words in ("database or disk is full", "database is locked"):
            broken = type("Broken", (), {"execute": refusing(sqlite3.OperationalError(words))})()
            with patched(os, "_exit", refusing(AssertionError("ended"))):
                with self.assertRaisesRegex(nexus.NexusError, words):
                    database._checkpoint(broken, "PASSIVE")

    @unittest.skipUnless(hasattr(os, "pwrite"), "Windows cannot write at a place")
    def test_what_a_failed_sync_beside_a_commit_has_dropped_is_written_again(self):
        server = self.server(db=self.path)
        database = server.store.db
        self.send(server)
        log, done, syncs = self.read(self.path + "-wal"), [], iter([OSError(), None])
        broken = type("Broken", (), {"execute": refusing(sqlite3.OperationalError("I/O error"))})()

        def write(_, data, at):
            done.append((at, data))
            return len(data)

        def sync(_):
            done.append("sync")
            for trouble in filter(None, [next(syncs)]):
                raise trouble
        with patched(os, "pwrite", write), patched(os, "fsync", sync), patched(
                os, "_exit", lambda code: done.append((code, database._writer_lock.locked()))):
            database._checkpoint(broken, "PASSIVE")
        database._writer_lock.release()
        once = [(0, log), (1 << 20, b""), "sync"]
        self.assertEqual(done, once + once + [(1, True)])
        self.assertIn("The server ends", server.lines.pop())

    @unittest.skipUnless(sys.platform == "linux", "LD_PRELOAD is Linux's")
    def test_a_power_cut_after_failed_syncs_leaves_every_message_that_was_answered(self):
        shim = os.path.join(self.home, "shim.so")
        compiler = shutil.which("cc") or shutil.which("gcc")
        if not compiler or subprocess.call(
                [compiler, "-shared", "-fPIC", "-o", shim, self.written("shim.c", SHIM.encode()),
                 "-ldl", "-lpthread"], stderr=subprocess.DEVNULL):
            self.skipTest("no C compiler that works")
        for seed in range(int(os.environ.get("NEXUS_TEST_POWER_CUTS", 1))):
            self.power_cut(shim, seed + 1)

    def power_cut(self, shim, seed):
        """Serve until a sync fails and that ends the server, twice; then look at the disk."""
        shutil.copy(self.filled("first"), self.path + ".disk")
        self.written("x.db-wal.disk")
        kept = []
        for turn in range(2):
            process, url = self.serve(LD_PRELOAD=shim, SHIM_DB=self.path, SHIM_PERCENT="10",
                                      SHIM_SEED=str(2 * seed + turn))
            workers = [Started(self.work, url, number, kept) for number in range(8) if url]
            try:
                self.assertEqual(process.wait(20), 1)
            finally:
                process.kill()
            for worker in workers:
                worker.result()
        image = os.path.join(self.home, "image.db")
        for end in ("", "-wal"):
            os.replace(self.path + end + ".disk", image + end)
        with contextlib.closing(sqlite3.connect(image)) as db:
            self.assertEqual(db.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
            stored = {number for number, in db.execute("SELECT id FROM messages")}
            self.assertLessEqual(set(kept), stored)
        for name in os.listdir(self.home):
            if ".db" in name:
                os.unlink(os.path.join(self.home, name))

    @staticmethod
    def work(url, number, kept):
        """Send, or read what the one before sends, until the server is gone."""
        client = nexus.Client(url, patience=-1)
        for call in itertools.count():
            try:
                if number % 2:
                    client.messages.inbox("c%d" % (number - 1), limit=1000)
                else:
                    text = "x" * (call * 997 % 3000)
                    kept.append(client.messages.send("c%d" % number, text)["id"])
            except nexus.Unreachable:
                return
            except nexus.NexusError:
                pass                                # 503: the log could not be synced


class BackupAndRestore(DiskCase):

    def run_verb(self, *words, code=0):
        ran = run_here(self.home, *words)
        self.assertEqual(ran.code, code, ran)
        return ran.json

    def backup(self, name="copy.db", code=0, db=None):
        return self.run_verb("backup", os.path.join(self.home, name), "--db", db or self.path,
                             code=code)

    def restore(self, name="copy.db", code=0):
        return self.run_verb("restore", os.path.join(self.home, name), "--db", self.path, code=code)

    def crash(self, *contents):
        """Send these, then leave the files as kill -9 leaves them: the rest is in the log."""
        saved = self.folder()
        with Server(db=self.path) as server:
            for content in contents:
                self.assertEqual(self.send(server, content), 201)
            for end in ("", "-wal", "-shm"):
                shutil.copy(self.path + end, saved)
        for name in os.listdir(saved):
            shutil.copy(os.path.join(saved, name), self.home)

    def test_of_postgresql_it_names_the_tool_that_does_it(self):
        for verb, tool in (("backup", "pg_dump"), ("restore", "psql")):
            ran = run_here(self.home, verb, "x", "--db", "postgresql://u:hush@h/d")
            self.assertEqual((ran.code, ran.json["error"]), (1, "not_a_file"))
            self.assertIn(tool, ran.json["message"])
            self.assertNotIn("hush", ran.out + ran.err)
            self.assertEqual(os.listdir(self.home), [])

    def test_a_backup_of_a_running_server_has_everything_and_leaves_nothing_beside(self):
        self.addCleanup(os.umask, os.umask(0))
        server = self.server(db=self.path)
        self.send(server, "still in the log")
        before = set(os.listdir(self.home))
        found = self.backup()
        self.assertEqual(set(os.listdir(self.home)) - before, {"copy.db"})
        if MODES:
            self.assertEqual(self.modes()["copy.db"], "0o600")
        self.assertEqual((found["ok"], found["bytes"]),
                         (True, os.path.getsize(os.path.join(self.home, "copy.db"))))
        self.assertEqual(self.send(server), 201)
        self.assertEqual(self.contents(os.path.join(self.home, "copy.db")), ["still in the log"])

    def test_a_backup_changes_nothing_where_the_database_lies(self):
        self.crash("in the log")
        before = {name: self.read(os.path.join(self.home, name)) for name in os.listdir(self.home)}
        self.backup()
        before.pop("x.db-shm")                      # SQLite's index of the log, not data
        self.assertEqual(before, {name: self.read(os.path.join(self.home, name))
                                  for name in before})
        self.assertEqual(self.contents(os.path.join(self.home, "copy.db")), ["in the log"])

    def test_a_backup_that_was_killed_leaves_nothing_of_that_name(self):
        self.filled("x")
        script = ("import os, sys; sys.path.insert(0, %r); sys.dont_write_bytecode = True\n"
                  "import nexus; nexus.sync = lambda *_: os._exit(9); nexus.main()" % FOLDER)
        code = subprocess.call([sys.executable, "-S", "-c", script, "backup", "copy.db", "--db",
                                self.path], cwd=self.home)
        names = sorted(os.listdir(self.home))
        self.assertEqual((code, len(names)), (9, 2))
        self.assertRegex(names[0], r"copy\.db\.[0-9a-f]{8}\.draft")
        self.backup()

    def test_a_backup_that_fails_leaves_nothing(self):
        self.filled("x")
        for name, error in (("copy_database", sqlite3.OperationalError("database or disk is full")),
                            ("sync", OSError(5, "Input/output error"))):
            with patched(nexus, name, refusing(error)):
                self.assertEqual(self.backup(code=1)["error"], "backup_failed")
            self.assertEqual(os.listdir(self.home), ["x.db"])

    def test_a_backup_overwrites_nothing_and_follows_no_link(self):
        self.filled("x")
        self.written("copy.db", b"mine")
        self.assertEqual(self.backup(code=1)["error"], "file_exists")
        if MODES:
            os.symlink(os.path.join(self.home, "nowhere"), os.path.join(self.home, "link.db"))
            self.assertEqual(self.backup("link.db", code=1)["error"], "file_exists")
        late = os.path.join(self.home, "late.db")
        for missing in (False, True):               # file systems without hard links
            with contextlib.ExitStack() as stack:
                if missing:
                    stack.enter_context(patched(os, "link", refusing(OSError(1, "no links"))))
                stack.enter_context(between(nexus, "copy_database",
                                            lambda: self.written("late.db")))
                self.assertIn("there already", self.backup("late.db", code=1)["message"])
                self.assertEqual(self.read(late), b"")
                os.unlink(late)
                self.backup("late.db")
            self.assertEqual(self.contents(late), ["x"])
            os.unlink(late)
        self.assertEqual(self.read(os.path.join(self.home, "copy.db")), b"mine")
        self.assertEqual([name for name in os.listdir(self.home) if "draft" in name], [])

    def test_what_is_no_sound_database_of_ours_is_neither_copied_nor_restored(self):
        with contextlib.closing(sqlite3.connect(os.path.join(self.home, "other.db"))) as other:
            other.executescript("CREATE TABLE customers (name)")
        shutil.copy(self.filled("x" * 50000), os.path.join(self.home, "newer.db"))
        with contextlib.closing(sqlite3.connect(os.path.join(self.home, "newer.db"))) as newer:
            newer.execute("PRAGMA user_version=99")
        damaged = bytearray(self.read(self.path))
        damaged[8192:-8192] = b"\xa5" * (len(damaged) - 16384)
        self.written("damaged.db", damaged)
        self.written("text.db", b"Dear diary, " * 1000)
        self.written("empty.db")
        before = sorted(os.listdir(self.home))
        for name in ("other.db", "newer.db", "damaged.db", "text.db", "empty.db"):
            found = self.backup("copy.db", code=1, db=os.path.join(self.home, name))
            self.assertEqual(found["error"], "backup_failed")
            found = self.restore(name, code=1)
            self.assertEqual(found["error"], "restore_failed")
            self.assertIn("Moved aside: nothing", found["message"])
        self.assertEqual(self.restore("missing.db", code=1)["error"], "no_database")
        self.assertEqual(self.backup(code=1, db="missing.db")["error"], "no_database")
        self.assertEqual(sorted(os.listdir(self.home)), before)
        self.assertEqual(self.contents(), ["x" * 50000])

    def test_a_server_that_starts_during_a_backup_at_rest_is_noticed(self):
        self.filled("x")
        backup = nexus.copy_database

        def meanwhile():
            self.send(self.server(db=self.path), "y")
        with between(sqlite3, "connect", meanwhile):
            self.assertIn("started meanwhile", self.backup(code=1)["message"])
        self.backup()

    def test_restore_puts_the_copy_in_place_and_the_rest_aside(self):
        self.addCleanup(os.umask, os.umask(0))
        self.filled("in the copy")
        self.backup()
        self.crash("after it")
        found = self.restore()
        self.assertEqual(found["database"], self.path)
        self.assertEqual(sorted(os.path.basename(name) for name in found["moved"]),
                         ["x.db", "x.db-shm", "x.db-wal"])
        before = found["moved"][self.path]
        self.assertRegex(before, r"x\.db\.before-\d{8}-\d{6}-\d{3}$")
        self.assertEqual({before + end for end in ("", "-wal", "-shm")},
                         set(found["moved"].values()))
        if MODES:
            self.assertEqual(self.modes()["x.db"], "0o600")
        self.assertFalse([name for name in os.listdir(self.home)
                          if "draft" in name or "lock" in name])
        self.assertEqual(self.contents(), ["in the copy"])
        self.assertEqual(list(self.restore(os.path.basename(before))["moved"]), [self.path])
        self.assertEqual(self.contents(), ["in the copy", "after it"])      # its log counts, too
        os.unlink(self.path)
        self.assertEqual(self.restore()["moved"], {})
        self.assertEqual(self.contents(), ["in the copy"])

    @unittest.skipUnless(MODES, "Windows has no links for everybody")
    def test_restore_moves_nothing_aside_through_a_link(self):
        os.symlink(self.filled("x"), os.path.join(self.home, "link.db"))
        self.backup()
        self.path, real = os.path.join(self.home, "link.db"), self.path
        self.assertIn("symbolic link", self.restore(code=1)["message"])
        self.assertEqual(self.contents(real), ["x"])

    def test_restore_refuses_while_a_server_has_the_database(self):
        self.filled("x")
        self.backup()
        server = self.server(db=self.path)
        found = self.restore(code=1)
        self.assertIn("process %d" % os.getpid(), found["message"])
        self.assertEqual(self.send(server), 201)

    @unittest.skipUnless(MODES and os.geteuid() == 0 and shutil.which("mount"), "needs root")
    def test_a_copy_on_a_read_only_medium_can_be_restored(self):
        medium = self.folder()
        if subprocess.call(["mount", "-t", "tmpfs", "tmpfs", medium], stderr=subprocess.DEVNULL):
            self.skipTest("cannot mount here")
        self.addCleanup(subprocess.call, ["umount", medium])
        shutil.move(self.filled("far away"), os.path.join(medium, "c%d?x#.db"))
        subprocess.check_call(["mount", "-o", "remount,ro", medium])
        self.restore(os.path.join(medium, "c%d?x#.db"))
        self.assertEqual(self.contents(), ["far away"])

    def test_what_keeps_a_restore_from_its_end_is_said_with_what_was_moved(self):
        self.filled("x")
        self.backup()
        with patched(os, "link", refusing(OSError(1, "no"))), \
                patched(os, "rename", refusing(OSError(30, "read-only file system"))):
            found = self.restore(code=1)
        self.assertRegex(found["message"], "read-only.*Moved aside: nothing")
        self.assertEqual(self.contents(), ["x"])


# ----------------------------------------------------------------------------------------
# Tools for channels
#
# Waiting is tested with threads and bells, not with sleeps: a call starts in a thread, the test
# sees it parked, does what should (or should not) wake it, and looks at what it brought back.
# ----------------------------------------------------------------------------------------

FIELDS = ["id", "channel", "sender", "content", "status", "correlationId", "taskId", "metadata",
          "createdAt", "ackedAt", "expiresAt"]
LEASE_FIELDS = ["attempts", "leaseToken", "leasedBy", "leaseExpiresAt"]


def day_time(text):
    """Milliseconds since midnight of a time on the wire."""
    hours, minutes, seconds = text[11:-1].split(":")
    return (int(hours) * 60 + int(minutes)) * 60000 + int(seconds.replace(".", ""))


class ChannelCase(ServerCase):
    """Door 2 on one server; every test has a channel of its own, self.channel."""

    def setUp(self):
        self.channel = self._testMethodName

    def at(self, action="", channel=None):
        """The path of a channel."""
        return "/api/messages/inbox/" + nexus.percent(channel or self.channel) + action

    def post(self, content="hello", key=None, **values):
        """Send; returns the Answer."""
        body = dict({"channel": self.channel, "content": content}, **values)
        return self.s.call("POST", "/api/messages", body,
                           headers={"Idempotency-Key": key} if key else None)

    def put(self, content="hello", **values):
        """Send, successfully; returns the message."""
        return self.expect(self.post(content, **values), 201)

    def read(self, query="", channel=None, action=""):
        """The messages of an inbox; its frame is checked."""
        found = self.expect(self.s.call("GET", self.at(action, channel) + query), 200)
        self.assertEqual(found, {"messages": found["messages"], "count": len(found["messages"]),
                                 "channel": channel or self.channel, "more": found["more"]})
        return found["messages"]

    def ids(self, query="", **values):
        """The ids in an inbox."""
        return [message["id"] for message in self.read(query, **values)]

    def act(self, message, action, **body):
        """POST /api/messages/ID/ACTION: an Answer."""
        found = message["id"] if isinstance(message, dict) else message
        return self.s.call("POST", "/api/messages/%s/%s" % (found, action), body)

    def acted(self, message, action, **body):
        """The same, successfully; returns the message."""
        found = self.expect(self.act(message, action, **body), 200)
        self.assertEqual(list(found), ["message"])
        return found["message"]

    def count(self, channel=None):
        """How many messages are pending."""
        found = self.expect(self.s.call("GET", self.at("/count", channel)), 200)
        self.assertEqual(found, {"channel": channel or self.channel, "count": found["count"]})
        return found["count"]

    def ack_all(self, channel=None):
        """Acknowledge all; returns how many."""
        found = self.expect(self.s.call("POST", self.at("/ack", channel)), 200)
        self.assertEqual(list(found), ["channel", "ackedCount"])
        return found["ackedCount"]

    def lease(self, consumer="w", **values):
        """Lease; returns the list of messages."""
        answer = self.s.call("POST", self.at("/lease"), dict(values, consumer=consumer))
        found = self.expect(answer, 200)
        self.assertEqual((found["channel"], found["count"]), (self.channel, len(found["messages"])))
        return found["messages"]

    def parked(self, function, *args, **values):
        """Start a call that waits; returns it, a Started, once the server has parked it."""
        before = self.s.store.waiters.parked
        call = Started(function, *args, **values)
        until(lambda: self.s.store.waiters.parked > before or call.done())
        self.assertFalse(call.done(), "it did not wait")
        return call

    def faults(self, answer):
        """The fields that a 400 complains about."""
        found = self.expect(answer, 400, "invalid_request")
        self.assertEqual(found["_tag"], "HttpApiDecodeError")
        return {row["field"] for row in found["details"]}


# ----------------------------------------------------------------------------------------
# Channels over REST
#
# The wire is the seed's, to the letter: eleven fields, pure reads, acks that succeed once. Every
# string that can be percent-encoded is a channel, and none of them leads into a session.
# ----------------------------------------------------------------------------------------

class ChannelSend(ChannelCase):
    """POST /api/messages"""

    def test_a_message_has_exactly_the_eleven_fields_and_their_defaults(self):
        message = self.put("hi")
        self.assertEqual(list(message), FIELDS)
        self.assertIs(type(message["id"]), int)
        self.assertRegex(message["createdAt"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")
        self.assertEqual([message[name] for name in FIELDS[1:]], [
            self.channel, "api", "hi", "pending", None, None, {}, message["createdAt"], None, None])
        given = {"sender": "planner", "taskId": "t", "correlationId": "r", "metadata": {"a": 1}}
        full = self.put("x", ttlSeconds=3600, status="acked", id=99, unknown=None, **given)
        self.assertEqual(dict(full, **given), full)
        self.assertEqual((list(full), full["status"]), (FIELDS, "pending"))
        life = day_time(full["expiresAt"]) - day_time(full["createdAt"])
        self.assertEqual(life % 86400000, 3600000)
        self.assertEqual(self.read(), [message, full])

    def test_content_metadata_and_task_make_the_round_trip_unchanged(self):
        metadata = {"ключ 🦊": [1, 2.5, -0.001, 10 ** 30, 1e300, True, None, {"": [[]]}],
                    "nested": {"a": {"b": {"c": ["\u2028", "\x00", "\\", '"']}}}}
        content = "line\r\n\ttab \x00 🦊 \u2028"
        for task in ("", " ", "not a task", "ü" * 5000):
            message = self.put(content, metadata=metadata, taskId=task)
            self.assertEqual((message["metadata"], message["taskId"], message["content"]),
                             (metadata, task, content))
            self.assertEqual(self.read("?afterId=%d" % (message["id"] - 1)), [message])

    def test_content_is_as_large_as_the_body_limit_allows(self):
        frame = json.dumps({"channel": self.channel, "content": ""}).encode()
        content = "x" * (self.s.settings.max_body - len(frame))
        self.assertEqual(self.put(content)["content"], content)
        self.assertIn("_tag", self.expect(self.post(content + "x"), 413, "payload_too_large"))

    def test_all_faults_of_a_body_are_listed_at_once_and_null_is_not_absent(self):
        wrong = {"channel": 1, "content": [], "sender": {}, "taskId": 3, "ttlSeconds": "60",
                 "correlationId": True, "metadata": "{}"}
        for body in (wrong, dict.fromkeys(wrong)):
            self.assertEqual(self.faults(self.s.call("POST", "/api/messages", body)), set(wrong))
        self.assertEqual(self.faults(self.s.call("POST", "/api/messages", {})),
                         {"channel", "content"})
        for name, value in (("ttlSeconds", 0), ("ttlSeconds", -1), ("ttlSeconds", 1.5),
                            ("ttlSeconds", True), ("channel", ""), ("channel", "x" * 257),
                            ("content", ""), ("metadata", []), ("taskId", None)):
            with self.subTest(name=name, value=value):
                self.assertEqual(self.faults(self.post(**{name: value})), {name})
        self.assertEqual(self.count(), 0)

    def test_json_needs_no_content_type_and_nothing_else_is_read(self):
        body = json.dumps({"channel": self.channel, "content": "x"}).encode()
        for headers in ({}, {"Content-Type": "application/json; charset=utf-8"}):
            self.expect(self.s.call("POST", "/api/messages", body, headers=headers), 201)
        self.expect(self.s.call("POST", "/api/messages", b"channel=a&content=b", headers={
            "Content-Type": "application/x-www-form-urlencoded"}), 415, "unsupported_media_type")
        for body in (b"{", b"[]", b'"x"', b"1", b"\xff", b'{"channel":"a","content":NaN}',
                     b'{"channel":"a","content":"\\ud800"}', b"[" * 100000):
            with self.subTest(body=body[:40]):
                answer = self.s.call("POST", "/api/messages", body)
                self.assertEqual(self.expect(answer, 400, "invalid_body")["_tag"],
                                 "HttpApiDecodeError")
        self.assertEqual(self.count(), 2)

    def test_secrets_are_blacked_out_of_content_and_metadata_and_the_types_are_told(self):
        password = "hunter" + "2xyz"
        message = self.put("see %s." % TOKEN, metadata={
            "deep": [{"k": "password = '%s'" % password}], TOKEN: 1})
        self.assertEqual(list(message), FIELDS + ["redacted"])
        self.assertEqual(message["content"], "see [REDACTED:github-token].")
        self.assertEqual(set(message["redacted"]), {"github-token", "password"})
        self.assertEqual(self.read(), [message])
        self.assertNotRegex(json.dumps(message), TOKEN + "|" + password)
        self.assertEqual(self.acted(message, "ack")["redacted"], message["redacted"])


class ChannelInbox(ChannelCase):
    """GET /api/messages/inbox/:channel"""

    def test_reading_changes_nothing_and_every_filter_holds(self):
        ids = [self.put(str(n), sender="s%d" % (n % 2), correlationId="c%d" % (n // 3))["id"]
               for n in range(6)]
        self.acted(ids[0], "ack")
        for query, wanted in (
                ("", ids[1:]), ("?", ids[1:]), ("?afterId=%d" % ids[2], ids[3:]),
                ("?afterId=-1", ids[1:]), ("?afterId=%d" % ids[5], []), ("?limit=2", ids[1:3]),
                ("?limit=0", []), ("?sender=s1", ids[1::2]), ("?sender=S1", []),
                ("?sender=&correlationId=", ids[1:]), ("?correlationId=c1", ids[3:]),
                ("?sender=s0&correlationId=c0", [ids[2]]), ("?unknown=1", ids[1:]),
                ("?includeAcked=true", ids), ("?includeAcked=true&sender=s0&limit=1", [ids[0]]),
                ("?includeAcked=false", ids[1:]), ("?includeAcked=1", ids[1:]),
                ("?includeAcked=", ids[1:])):
            with self.subTest(query=query):
                self.assertEqual(self.ids(query), wanted)
        self.assertEqual(self.ids(), ids[1:], "reading consumed something")

    def test_limits_are_50_by_default_and_1000_at_most_and_faults_are_all_listed(self):
        body = json.dumps({"channel": self.channel, "content": "x"}).encode()
        link = http.client.HTTPConnection("127.0.0.1", self.s.port)
        self.addCleanup(link.close)
        for _ in range(1001):
            link.request("POST", "/api/messages", body)
            self.assertEqual(link.getresponse().read()[:6], b'{"id":')
        self.assertEqual([len(self.ids(query)) for query in (
            "", "?limit=1000", "?limit=1001", "?limit=999999")], [50, 1000, 1000, 1000])
        for query, fields in (("?limit=-1&afterId=x&wait=61", {"limit", "afterId", "wait"}),
                              ("?limit=1.5", {"limit"}), ("?wait=-1", {"wait"}),
                              ("?afterId=1e3", {"afterId"}), ("?sender=%ff", {"sender"})):
            self.assertEqual(self.faults(self.s.call("GET", self.at() + query)), fields, query)

    def test_any_string_of_1_to_256_characters_is_a_channel_of_its_own(self):
        names = ["/", "a/b", "a/b/count", " ", "a b", "+", ":", "task:tx-abc123", "ключ-日本-🦊", "%",
                 "%2F", "%25", "?", "#", "a?b#c&d=e;f", "ack", "count", "gc", "inbox", "lease",
                 "dead", ".", "..", "../..", "\\", '"', "'", "\n", "\x00", "\x00b", "null", "0",
                 "é", "e\u0301", "x" * 256, "🦊" * 256]
        for name in names:
            self.put("for " + name[:9], channel=name)
        for name in names:
            with self.subTest(name=name[:20]):
                self.assertEqual([(m["channel"], m["content"]) for m in self.read(channel=name)],
                                 [(name, "for " + name[:9])])
                self.assertEqual((self.count(name), self.ack_all(name)), (1, 1))
        by_hand = self.s.call("GET", "/api/messages/inbox/%e2%98%95%2f%23")     # not by our client
        self.assertEqual(self.expect(by_hand, 200)["channel"], "☕/#")
        for action in ("", "/count", "/dead"):
            self.assertEqual(self.faults(self.s.call("GET", self.at(action, "x" * 257))),
                             {"channel"})

    def test_wait_returns_what_is_there_is_woken_by_a_send_and_else_ends_empty(self):
        first = self.put()["id"]
        self.assertEqual(self.ids("?wait=60"), [first])
        call = self.parked(self.ids, "?wait=60&afterId=%d" % first)
        began = time.monotonic()
        second = self.put()["id"]
        self.assertEqual(call.result(), [second])
        self.assertLess(time.monotonic() - began, 5)
        ends = [Started(self.ids, "?wait=1&sender=nobody"),
                Started(self.s.client().messages.lease, "nobody's", "w", wait=1)]
        self.assertEqual([call.result() for call in ends], [[], []])
        with patched(self.s.store.waiters, "limit", 0):     # who does not wait needs no place
            query = "?afterId=%d" % second
            self.assertEqual((self.ids(query), self.ids(query + "&wait=0")), ([], []))
            self.channel = "nobody's"
            self.assertEqual((self.lease(), self.lease(wait=0)), ([], []))

    def test_a_waiting_reader_gets_only_what_it_waits_for(self):
        seen = self.put(sender="bob")
        picky = self.parked(self.ids, "?wait=30&sender=ada&correlationId=c")
        after = self.parked(self.ids, "?wait=30&afterId=%d" % seen["id"])
        idle = self.parked(self.ids, "?wait=30&sender=nobody")
        self.acted(seen, "ack")
        self.put(sender="ada", correlationId="c", channel="elsewhere")
        fresh = self.put(sender="bob", correlationId="c")["id"]
        self.assertEqual(after.result(), [fresh])
        self.put(sender="ada")
        wanted = self.put(sender="ada", correlationId="c")["id"]
        self.assertEqual(picky.result(), [wanted])
        self.assertFalse(idle.done())
        self.s.clock.advance(31)
        self.put()                          # a bell that brings nothing, after the end
        self.assertEqual(idle.result(), [])

    def test_sessions_and_channels_never_see_each_other(self):
        session, keys = self.s.session(("ada", "bob"), greeting="welcome")
        sent = self.s.send(session, "ada", "private", keys["ada"]).json
        poll = self.parked(self.s.poll, session, "bob", "?after=1&wait=30")
        for name in (session, "session:" + session, "1", "sessions/" + session, "ada", sent["id"],
                     "('session', 1)"):
            self.put("for the channel", channel=name)
            self.assertEqual([m["content"] for m in self.read("?includeAcked=true", name)],
                             ["for the channel"])
        self.assertEqual(self.faults(self.act(sent["id"], "ack")), {"id"})
        self.assertFalse(poll.done())
        self.s.send(session, "ada", "more", keys["ada"])
        self.assertEqual([m["text"] for m in poll.result().json["messages"]], ["more"])

    def test_a_cursor_loop_sees_every_message_once_and_in_order_while_16_write(self):
        self.s = self.server(db=os.path.join(self.folder(), "n.db"))
        writers = [Started(lambda who: [self.put("%d-%d" % (who, n)) for n in range(12)], who)
                   for who in range(16)]
        seen = []
        while len(seen) < 16 * 12:
            batch = self.read("?limit=7&wait=5&afterId=%d" % (seen[-1]["id"] if seen else 0))
            self.assertTrue(batch, "a message was passed over")
            seen += batch
        sent = [writer.result() for writer in writers]
        self.assertEqual(seen, sorted(sum(sent, []), key=lambda m: m["id"]))
        for own in sent:                    # and each writer's own order holds
            self.assertEqual(own, [m for m in seen if m in own])


class ChannelAck(ChannelCase):
    """Acks, counts, collection, identity."""

    def test_an_ack_changes_status_and_time_and_nothing_else(self):
        message = self.put(metadata={"a": 1}, taskId="t", correlationId="c")
        self.s.clock.advance(1.5)
        acked = self.acted(message, "ack")
        self.assertEqual(acked, dict(message, status="acked", ackedAt=acked["ackedAt"]))
        self.assertGreater(acked["ackedAt"], message["createdAt"])
        self.assertEqual((self.read(), self.read("?includeAcked=true")), ([], [acked]))

    def test_a_second_ack_a_missing_message_and_a_faulty_id_are_told_apart(self):
        message = self.put()
        self.acted(message, "ack")
        for target, status, code, text, tag in (
                (message["id"], 400, "already_acked", "Message already acked", "BadRequest"),
                (99999999, 404, "not_found", "Message not found", "NotFound")):
            found = self.expect(self.act(target, "ack"), status, "message_" + code)
            self.assertEqual((found["message"], found["_tag"]), ("%s: %d" % (text, target), tag))
        for odd in ("x", "1.5", "-1", "%20", "9" * 30, str(2 ** 63)):
            self.assertEqual(self.faults(self.act(odd, "ack")), {"id"}, odd)

    def test_of_ten_concurrent_acks_exactly_one_wins(self):
        for _ in range(5):
            message = self.put()
            calls = [Started(self.act, message, "ack") for _ in range(10)]
            self.assertEqual(sorted(call.result().status for call in calls), [200] + [400] * 9)

    def test_empty_bodies_are_fine_with_a_content_type_and_without(self):
        for headers in ({}, {"Content-Type": "application/json"}, {"Content-Length": "0"}):
            message = self.put()
            for method, path in (("GET", self.at()), ("GET", self.at("/count")),
                                 ("POST", "/api/messages/%d/ack" % message["id"]),
                                 ("POST", self.at("/ack")), ("POST", "/api/messages/gc")):
                self.expect(self.s.call(method, path, headers=headers), 200)

    def test_ack_all_and_count_mean_the_pending_messages_of_one_channel(self):
        ids = [self.put()["id"] for _ in range(300)]        # more than one step of the store
        other = self.put(channel="other")
        self.acted(ids[0], "ack")
        self.assertEqual((self.count(), self.count("other"), self.count("unused")), (299, 1, 0))
        self.assertEqual((self.ack_all(), self.ack_all()), (299, 0))
        self.assertEqual((self.count(), self.ids(channel="other")), (0, [other["id"]]))

    def test_gc_removes_what_expired_and_what_was_acked_long_enough_ago(self):
        self.s = self.server()

        def gc(body=None):
            return tuple(self.expect(self.s.call("POST", "/api/messages/gc", body), 200).values())
        self.put()
        self.put(ttlSeconds=10)
        self.acted(self.put(), "ack")
        self.s.clock.advance(20)
        self.assertEqual((gc(), gc({})), ((1, 0), (0, 0)))
        self.s.clock.advance(1700)
        self.acted(self.put(), "ack")
        self.assertEqual(gc({"ackedOlderThanHours": 0.5}), (0, 0))
        self.s.clock.advance(100)
        self.assertEqual([gc({"ackedOlderThanHours": hours}) for hours in (0.5, 0, 0)],
                         [(0, 1), (0, 1), (0, 0)])
        self.assertEqual(len(self.read("?includeAcked=true")), 1)
        for hours in (-1, -0.001, "1", None, True):
            self.assertEqual(self.faults(self.s.call("POST", "/api/messages/gc", {
                "ackedOlderThanHours": hours})), {"ackedOlderThanHours"})
        self.put(ttlSeconds=1)              # one goes in the background, one by gc itself
        self.s.clock.advance(2)
        self.assertEqual(self.s.sweep(), 1)
        self.put(ttlSeconds=1)
        self.s.clock.advance(2)
        self.assertEqual((gc(), gc()), ((2, 0), (0, 0)))

    def test_ids_grow_and_never_return_after_gc_and_restart(self):
        path = os.path.join(self.folder(), "n.db")
        self.s = self.server(db=path)
        kept, gone = self.put("kept", metadata={"a": "ü"}), self.put()
        self.acted(gone, "ack")
        self.s.client().messages.gc(0)
        self.s.stop()
        self.s = self.server(db=path)
        self.assertEqual(self.read("?includeAcked=true"), [kept])
        self.assertGreater(self.put(channel="another")["id"], gone["id"])

    def test_every_refusal_under_api_has_a_tag(self):
        self.s = self.server(token="t0ken")
        self.s.store.channels.count = lambda *_: {}[self.channel]       # a fault of ours
        key = {"X-Api-Key": "t0ken"}
        for method, path, headers, status, code, tag in (
                ("GET", self.at("/count"), key, 500, "internal_error", "InternalError"),
                ("GET", "/api/nothing", key, 404, "not_found", "NotFound"),
                ("DELETE", "/api/messages", key, 405, "method_not_allowed", None),
                ("GET", self.at(), {}, 401, "unauthorized", "UNAUTHORIZED"),
                ("GET", self.at(), {"Host": "evil.example"}, 403, "host_not_allowed", None)):
            found = self.expect(self.s.call(method, path, headers=headers), status, code)
            self.assertEqual(found["_tag"], tag or found["_tag"])
        line, = self.s.lines
        self.assertNotIn(self.channel, line)
        self.s.lines.clear()


# ----------------------------------------------------------------------------------------
# Idempotency keys
#
# The same key and body from the same sender to the same place is the same message, as long as
# that message is kept; what was refused or belongs to somebody else does not count.
# ----------------------------------------------------------------------------------------

class ChannelIdempotency(ChannelCase):
    """Idempotency-Key on channel sends."""

    def replay(self, first, again):
        """The second answer is the first one over again."""
        self.assertEqual((again.status, again.json), (201, first.json))
        self.assertEqual([a.headers.get("idempotent-replay") for a in (first, again)],
                         [None, "true"])

    def test_the_same_key_and_body_give_the_first_answer_even_after_an_ack(self):
        first = self.post("x %s" % TOKEN, "k", metadata={"a": 1}, ttlSeconds=9)
        self.acted(first.json, "ack")
        self.replay(first, self.post("x %s" % TOKEN, "k", metadata={"a": 1}, ttlSeconds=9))
        self.assertEqual(self.ids("?includeAcked=true"), [first.json["id"]])
        texts = ['{"channel": "%s", "content": "\u00fc", "metadata": {"a": 1, "b": [2]}}',
                 '{"metadata":{"b":[2],"a":1},\n"content":"\\u00fc","channel":"%s"}']
        self.replay(*[self.s.call("POST", "/api/messages", (text % self.channel).encode(),
                                  headers={"Idempotency-Key": "json"}) for text in texts])

    def test_another_body_is_refused_but_another_sender_or_channel_is_another_matter(self):
        first = self.post("x", "k")
        for values in ({"content": "y"}, {"taskId": "t"}, {"ttlSeconds": 60},
                       {"correlationId": "c"}, {"metadata": {"a": 1}}):
            self.expect(self.post(key="k", **dict({"content": "x"}, **values)), 409,
                        "idempotency_key_reused")
        self.assertEqual(self.ids(), [first.json["id"]])
        others = [self.put("y", key="k", **v) for v in ({"sender": "ada"}, {"channel": "other"})]
        self.assertEqual(len({m["id"] for m in others} | {first.json["id"]}), 3)
        self.expect(self.post("x", "k" * 128), 201)
        self.assertEqual(self.faults(self.post("x", "k" * 129)), {"Idempotency-Key"})

    def test_keys_survive_a_restart_and_live_as_long_as_their_message(self):
        path = os.path.join(self.folder(), "n.db")
        self.s = self.server(db=path)
        self.assertEqual(self.faults(self.post("x", "k", ttlSeconds=0)), {"ttlSeconds"})
        first = self.post("x", "k", ttlSeconds=60)
        self.s.stop()
        self.s = self.server(db=path)
        self.replay(first, self.post("x", "k", ttlSeconds=60))
        self.expect(self.post("y", "k"), 409, "idempotency_key_reused")
        self.s.clock.advance(61)
        self.s.sweep()
        self.assertGreater(self.put("y", key="k")["id"], first.json["id"])

    def test_of_ten_at_once_one_is_stored(self):
        answers = [call.result() for call in [Started(self.post, "x", "k") for _ in range(10)]]
        self.assertEqual({(a.status, a.json["id"]) for a in answers}, {(201, self.ids()[0])})
        self.assertEqual(sum("idempotent-replay" in a.headers for a in answers), 9)
        self.assertEqual(self.count(), 1)


# ----------------------------------------------------------------------------------------
# Leases
#
# A message is held by one worker at a time, for as long as the lease says, and comes back when
# the worker does not. Who uses no leases notices nothing of them.
# ----------------------------------------------------------------------------------------

class ChannelLease(ChannelCase):
    """Lease, extend, release, dead, revive."""

    def test_the_oldest_free_messages_come_each_with_a_token_of_its_own(self):
        sent = [self.put(str(n)) for n in range(4)]
        first, = self.lease("ada")
        self.assertEqual(list(first), FIELDS + LEASE_FIELDS)
        self.assertEqual(dict(first, **sent[0]), first)
        self.assertEqual((first["attempts"], first["leasedBy"]), (1, "ada"))
        more = self.lease("bob", limit=2)
        self.assertEqual([m["id"] for m in more], [m["id"] for m in sent[1:3]])
        self.assertEqual(len({m["leaseToken"] for m in [first] + more}), 3)
        self.assertEqual([m["content"] for m in self.lease("ada", limit=100)], ["3"])
        self.assertEqual(self.lease("cy"), [])

    def test_a_lease_lasts_60_seconds_or_as_told_and_is_then_offered_again(self):
        self.put()
        self.put()
        first, = self.lease()
        self.lease(leaseSeconds=3600)
        self.s.clock.advance(59)
        self.assertEqual(self.lease(), [])
        self.s.clock.advance(2)
        again, = self.lease("other", limit=9)
        self.assertEqual((again["id"], again["attempts"], again["leasedBy"]),
                         (first["id"], 2, "other"))
        self.assertNotEqual(again["leaseToken"], first["leaseToken"])
        self.s.clock.advance(5 * 3600)      # a jump of hours: both are over, both come once
        self.assertEqual([m["attempts"] for m in self.lease(limit=9)], [3, 2])
        self.assertEqual(self.lease(), [])

    def test_readers_and_plain_acks_notice_nothing(self):
        sent = [self.put() for _ in range(3)]
        held, _ = self.lease(limit=2)
        self.assertEqual((self.read(), self.count()), (sent, 3))
        acked = self.acted(sent[0], "ack")
        self.assertEqual((list(acked), acked["status"]), (FIELDS, "acked"))
        self.expect(self.act(held, "ack", leaseToken=held["leaseToken"]), 400,
                    "message_already_acked")
        self.assertEqual(self.ack_all(), 2)
        self.s.clock.advance(61)
        self.assertEqual(self.lease(), [])

    def test_only_the_current_token_acks_extends_and_releases(self):
        def refused(message, token):
            for action, body in (("ack", {}), ("release", {}), ("extend", {"leaseSeconds": 9})):
                answer = self.act(message, action, leaseToken=token, **body)
                self.assertIn("_tag", self.expect(answer, 409, "lease_expired"))
        message = self.put()
        refused(message, "never leased")
        old, = self.lease(leaseSeconds=1)
        self.s.clock.advance(2)
        refused(message, old["leaseToken"])         # over, and not yet anybody else's
        new, = self.lease()
        for token in (old["leaseToken"], "wrong", "ü🦊"):
            refused(message, token)
        self.assertEqual(self.acted(new, "ack", leaseToken=new["leaseToken"])["status"], "acked")
        self.expect(self.act(99999999, "release", leaseToken="x"), 404, "message_not_found")

    def test_extend_sets_the_end_and_release_gives_back_after_the_delay(self):
        self.put()
        message, = self.lease(leaseSeconds=10)
        token = message["leaseToken"]
        longer = self.acted(message, "extend", leaseToken=token, leaseSeconds=100)
        self.assertGreater(longer["leaseExpiresAt"], message["leaseExpiresAt"])
        self.assertEqual(dict(longer, leaseExpiresAt=message["leaseExpiresAt"]), message)
        self.s.clock.advance(99)
        self.assertEqual(self.lease(), [])
        released = self.acted(message, "release", leaseToken=token, delaySeconds=30)
        self.assertEqual((list(released), released["status"]), (FIELDS, "pending"))
        self.s.clock.advance(29)
        self.assertEqual(self.lease(), [])
        self.s.clock.advance(2)
        again, = self.lease()
        self.acted(again, "release", leaseToken=again["leaseToken"])
        self.assertEqual([m["attempts"] for m in [again] + self.lease()], [2, 3])

    def test_a_waiting_worker_is_woken_by_a_send_a_release_and_the_end_of_lease_or_delay(self):
        call = self.parked(self.lease, wait=30)
        self.put()
        held, = call.result()
        call = self.parked(self.lease, leaseSeconds=1, wait=30)
        self.acted(held, "release", leaseToken=held["leaseToken"])
        self.assertEqual([m["attempts"] for m in call.result()], [2])
        for end, attempts in (("lease", [3]), ("delay", [4])):
            if end == "delay":
                self.acted(held, "release", leaseToken=held["leaseToken"], delaySeconds=1)
            self.s.clock.advance(0.999)
            call = self.parked(self.lease, wait=30)
            self.s.clock.advance(0.001)
            held, = call.result()
            self.assertEqual([held["attempts"]], attempts)

    def test_after_max_attempts_a_message_is_dead_until_revived(self):
        self.s = self.server(max_attempts=2)
        dead, held = self.put("poison"), self.put("later")
        for _ in range(2):
            self.assertEqual(self.lease()[0]["id"], dead["id"])
            self.assertEqual(self.read(action="/dead"), [], "it is held, not dead")
            self.s.clock.advance(61)
        self.assertEqual([m["id"] for m in self.lease(limit=9)], [held["id"]])
        self.assertEqual(self.read(action="/dead"), [dead])
        self.assertEqual((self.count(), self.ids()), (2, [dead["id"], held["id"]]))
        call = self.parked(self.lease, wait=30)
        self.assertEqual(self.acted(dead, "revive"), dead)
        self.assertEqual([(m["id"], m["attempts"]) for m in call.result()], [(dead["id"], 1)])
        self.assertEqual(self.read(action="/dead"), [])
        self.expect(self.act(99999999, "revive"), 404, "message_not_found")

    def test_five_attempts_are_the_default_and_the_dead_list_pages_like_an_inbox(self):
        ids = [self.put()["id"] for _ in range(3)]
        for attempt in range(1, 6):
            for held in self.lease(limit=3):
                self.assertEqual(held["attempts"], attempt)
                self.acted(held, "release", leaseToken=held["leaseToken"])
        self.assertEqual(self.lease(), [])
        for query, wanted in (("", ids), ("?limit=2", ids[:2]), ("?limit=0", []),
                              ("?limit=5000", ids), ("?afterId=%d" % ids[0], ids[1:])):
            self.assertEqual(self.ids(query, action="/dead"), wanted)
        self.assertEqual(self.faults(self.s.call("GET", self.at("/dead?limit=-1&afterId=x"))),
                         {"limit", "afterId"})
        self.assertEqual(self.acted(ids[0], "ack")["status"], "acked")
        self.assertEqual(self.ids(action="/dead"), ids[1:])
        self.expect(self.act(ids[0], "revive"), 400, "message_already_acked")

    def test_every_parameter_has_its_limits(self):
        self.put()
        for path, least, rows in (
                (self.at("/lease"), {"consumer": "w"}, {
                    "consumer": ["", "x" * 257, None, 1], "limit": [0, 101, 1.5, "1", None],
                    "leaseSeconds": [0, 3601, "60", None], "wait": [-1, 61, "1", None]}),
                ("/api/messages/1/release", {"leaseToken": "t"}, {
                    "leaseToken": ["", 1, None], "delaySeconds": [-1, 3601, "1", None]}),
                ("/api/messages/1/extend", {"leaseToken": "t", "leaseSeconds": 1}, {
                    "leaseToken": [None], "leaseSeconds": [0, 3601, None, 0.5]}),
                ("/api/messages/1/ack", {}, {"leaseToken": [None, 1, ""]})):
            for field, value in ((name, value) for name in rows for value in rows[name]):
                with self.subTest(path=path, field=field, value=str(value)[:9]):
                    body = dict(least, **{field: value})
                    self.assertEqual(self.faults(self.s.call("POST", path, body)), {field})
            if least:
                self.assertEqual(self.faults(self.s.call("POST", path, {})), set(least))
        self.assertEqual(len(self.lease("x" * 256, limit=100, leaseSeconds=3600, wait=60)), 1)

    def test_eight_workers_that_die_at_random_do_everything_and_never_two_the_same(self):
        self.s = self.server(max_attempts=1000)
        total, leases, acked = 100, [], {}
        for n in range(total):
            self.put(str(n))

        def work(number):
            chance = random.Random(number)
            while len(acked) < total:
                batch = self.lease("w%d" % number, limit=chance.randint(1, 3), leaseSeconds=1)
                leases.extend(batch)
                for message in batch:
                    if chance.random() < 0.25:
                        break               # it dies: nobody hears of the rest of its batch
                    done = self.act(message, "ack", leaseToken=message["leaseToken"])
                    if done.status == 200:
                        self.assertNotIn(message["id"], acked)
                        acked[message["id"]] = done.json["message"]["ackedAt"]
                if not batch:
                    time.sleep(0.005)
        workers = [Started(work, number) for number in range(8)]
        while not all(worker.done() for worker in workers):
            time.sleep(0.02)
            self.s.clock.advance(0.3)       # the supervisor: time goes by, for dead workers too
        for worker in workers:
            worker.result()
        self.assertEqual((len(acked), self.count()), (total, 0))
        self.assertGreater(len(leases), total + 20, "nobody died")
        held = collections.defaultdict(list)
        for lease in sorted(leases, key=lambda m: m["attempts"]):
            held[lease["id"]].append(lease)
        for message_id, rows in held.items():
            self.assertEqual([m["attempts"] for m in rows], list(range(1, len(rows) + 1)))
            ends = [m["leaseExpiresAt"] for m in rows]
            for end, later in zip(ends, ends[1:]):          # all leases are of one second
                self.assertLessEqual(day_time(end), day_time(later) - 1000, "two at once")
            self.assertLessEqual(acked[message_id], ends[-1])


# ----------------------------------------------------------------------------------------
# Ask and reply
#
# A reply finds its channel and correlation by itself and acknowledges the question in the same
# commit; who asked in vain is told so, with the question and the way to go on waiting.
# ----------------------------------------------------------------------------------------

class AskAndReply(ChannelCase):
    """POST /api/messages/:id/reply, client.messages.ask, tx ask --resume."""

    def reply(self, question, status=201, code=None, key=None, **body):
        """Reply; returns the message (or the refusal)."""
        return self.expect(self.s.call(
            "POST", "/api/messages/%d/reply" % question["id"], body,
            headers={"Idempotency-Key": key} if key else None), status, code)

    def test_each_answer_finds_its_question_and_acknowledges_it(self):
        asked = [Started(self.s.client().messages.ask, self.channel, str(n), 30) for n in range(4)]
        until(lambda: self.count() == 4)
        for question in reversed(self.read()):
            back = question["metadata"]["replyTo"]
            answer = self.reply(question, content="re " + question["content"], sender="bob",
                                metadata={"sure": True})
            self.assertEqual(list(answer), FIELDS)
            self.assertEqual([answer[name] for name in (
                "channel", "sender", "correlationId", "metadata")],
                [back, "bob", question["correlationId"], {"sure": True}])
            self.assertTrue(question["correlationId"] and back != self.channel)
            until(lambda: self.count(back) == 0)        # the asker has acknowledged it
        self.assertEqual([call.result()["content"] for call in asked],
                         ["re %d" % n for n in range(4)])
        self.assertEqual(self.count(), 0)

    def test_without_a_reply_channel_the_answer_goes_to_the_sender(self):
        for metadata in ({}, {"replyTo": ""}, {"replyTo": 5}, {"replyTo": "x" * 257}):
            question = self.put(sender="ada", correlationId="c9", metadata=metadata)
            answer = self.reply(question, content="token " + TOKEN)
            self.assertEqual([answer[name] for name in (
                "channel", "correlationId", "sender", "content", "redacted")],
                ["ada", "c9", "api", "token [REDACTED:github-token]", ["github-token"]])

    def test_an_acked_question_can_be_answered_and_a_repeated_answer_is_one(self):
        question = self.put(sender="late")
        acked = self.acted(question, "ack")
        answers = [self.reply(question, key="k", content="x") for _ in range(2)]
        self.assertEqual(answers[0], answers[1])
        self.assertEqual((self.read("?includeAcked=true"), self.count("late")), ([acked], 1))

    def test_a_refused_answer_leaves_the_question_pending_and_stores_nothing(self):
        self.s = self.server(max_channel_messages=1)
        self.put(channel="full")
        question = self.put(metadata={"replyTo": "full"})
        held, = self.lease()
        for status, code, body in (
                (429, "quota_exceeded", {"content": "x"}),
                (409, "lease_expired", {"content": "x", "leaseToken": "wrong"}),
                (400, "invalid_request", {"content": ""}), (400, "invalid_request", {}),
                (400, "invalid_request", {"content": "x", "metadata": None})):
            self.reply(question, status, code, **body)
        self.assertEqual((self.ids(), self.count("full")), ([question["id"]], 1))
        self.ack_all("full")
        self.s.client().messages.gc(0)
        self.reply(question, content="x", leaseToken=held["leaseToken"])
        self.assertEqual((self.count(), self.count("full")), (0, 1))
        self.reply({"id": 99999999}, 404, "message_not_found", content="x")

    def test_who_asks_in_vain_gets_the_question_and_a_command_that_does_not_ask_twice(self):
        channel, home = "re view's; $(x)", self.folder()
        with self.assertRaises(nexus.NexusError) as caught:
            self.s.client().messages.ask(channel, "well?", timeout=0)
        error, (question,) = caught.exception, self.read(channel=channel)
        self.assertEqual((error.code, error.extra["question"]), ("no_reply", question))
        acked = self.acted(question, "ack")
        words = nexus.shlex.split(error.extra["resume"])
        ran = run_nexus(home, *(words[1:] + ["--timeout", "0"]))
        self.assertEqual((words[0], ran.code, ran.json["error"]), ("nexus.py", 1, "no_reply"))
        self.assertEqual(ran.json["question"], acked, "not as it stands now")
        self.reply(question, content="because")
        ran = run_nexus(home, *nexus.shlex.split(ran.json["resume"])[1:])
        self.assertEqual((ran.code, ran.out), (0, "because\n"))
        self.assertEqual(self.ids("?includeAcked=true", channel=channel), [question["id"]])


# ----------------------------------------------------------------------------------------
# The Python client
#
# Its signatures are promises; its retries are harmless: a send carries its key along, and what
# may not happen twice is not tried twice once the server could have done it.
# ----------------------------------------------------------------------------------------

class Scripted:
    """A TCP server that answers one request a connection from a script, then is gone.

    A step is the bytes of an answer, or a function from the request's bytes to them.
    """

    def __init__(self, case, *steps):
        self.requests, self._steps = [], steps
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10)
        self.url = "http://127.0.0.1:%d" % self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        case.addCleanup(self._close)

    def _run(self):
        with self._listener:
            for step in self._steps:
                sock, request = self._next()
                with sock:
                    if not request:
                        return              # _close() knocked
                    self.requests.append(request)
                    sock.sendall(step(request) if callable(step) else step)

    def _next(self):
        """The next request. Whoever looks whether TLS is spoken here gets no answer to that."""
        while True:
            sock, _ = self._listener.accept()
            request = self._read(sock)
            if request[:1] != b"\x16":
                return sock, request
            sock.close()

    @staticmethod
    def _read(sock):
        data, part, wanted = b"", b"x", None
        while part and data[:1] != b"\x16" and (wanted is None or len(data) < wanted):
            part = sock.recv(65536)
            data += part
            head = re.match(rb"(?s).*?\r\n\r\n", data)
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", data)
            wanted = head and head.end() + int(length.group(1) if length else 0)
        return data

    def _close(self):
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname()).close()
        self._thread.join()

    def keys(self):
        """The Idempotency-Keys of all requests, each once."""
        return {re.search(rb"(?i)\r\nidempotency-key: *(\S+)", request).group(1)
                for request in self.requests}


def http_answer(status, body, *headers):
    """The bytes of an HTTP answer; `body` is JSON, or bytes as it is."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = ["HTTP/1.1 %d X" % status, "Content-Length: %d" % len(body)] + list(headers)
    return "\r\n".join(lines + ["", ""]).encode() + body


BROKEN = http_answer(500, {"error": "internal_error"})
BUSY = http_answer(503, {"error": "server_busy", "message": "later"}, "Retry-After: 7")
LATER = http_answer(429, {"error": "rate_limit_exceeded", "message": "x"}, "Retry-After: 3")
SIGNATURES = """
create(ttl=None, max_agents=None, greeting=None, creator_agent_id=None)
status(session_id)  join(session_id, agent_id, session_key=None)  pair(session_id)
leave(session_id, agent_id, session_key)  renew(session_id, agent_id, ttl=None)
send(session_id, agent_id, text=None, json=None, session_key=None, idempotency_key=None)
poll(session_id, agent_id, after=None, members=False, limit=None, wait=None, others=None,
claim(code, agent_id)  pair_status(code)"""
CHANNEL_SIGNATURES = """
send(channel, content, inbox(channel, after_id=None, limit=None, ack(id, lease_token=None)
ack_all(channel)  pending(channel)  gc(acked_older_than_hours=None)  release(id, lease_token,
lease(channel, consumer, limit=1, lease_seconds=60, wait=0,  extend(id, lease_token, lease_seconds)
dead(channel, revive(id)  ask(channel, content, timeout=60, reply(id, content,"""


class ClientPromises(ChannelCase):
    """nexus.Client against the real server and against scripted ones."""

    def test_what_is_no_json_is_refused_in_words_before_it_is_sent(self):
        client, before = self.s.client(), self.s.app.requests
        for call in (lambda: client.send(UNKNOWN, "ada", "half \ud800"),
                     lambda: client.send(UNKNOWN, "ada", json={"a": {1, 2}}),
                     lambda: client.messages.send("c", object()),
                     lambda: list(client.messages.send_many([{"channel": "c", "content": b"x"}])),
                     lambda: list(client.messages.send_many(["c"])),
                     lambda: client.messages.ack_many([object()])):
            with self.assertRaisesRegex(nexus.NexusError, "JSON|dict") as caught:
                call()
            self.assertEqual((caught.exception.code, caught.exception.status),
                             ("invalid_request", 400))
        self.assertEqual(self.s.app.requests, before)

    def test_arguments_of_a_wrong_type_are_refused_in_words(self):
        client = self.s.client()
        for words, call in (("messages must be a list", lambda: list(client.messages.send_many(5))),
                            ("ids must be a list", lambda: client.messages.ack_many(5)),
                            ("channel is required",
                             lambda: list(client.messages.send_many([{3: 4}]))),
                            ("5 is not a server's URL", lambda: nexus.Client(5))):
            with self.assertRaisesRegex(nexus.NexusError, words):
                call()
        client.token = 5
        self.assertEqual(client.messages.send("c", "a token may be a number")["channel"], "c")

    def scripted(self, *steps):
        """(a Scripted, a client on it, the list of its sleeps)."""
        server, sleeps = Scripted(self, *steps), []
        return server, nexus.Client(server.url, sleep=sleeps.append), sleeps

    def fails(self, function, *args, **values):
        """The one exception that every failure raises; it has all its parts."""
        with self.assertRaises(nexus.NexusError) as caught:
            function(*args, **values)
        error = caught.exception
        self.assertTrue(error.code and error.message and error.status >= 400)
        return error

    def test_signatures_are_those_of_the_contract(self):
        def head(name, function):
            code, defaults = function.__code__, function.__defaults__ or ()
            names = list(code.co_varnames[1:code.co_argcount])
            for place, value in enumerate(defaults, len(names) - len(defaults)):
                names[place] += "=%r" % (value,)
            return "%s(%s)" % (name, ", ".join(names))
        client = self.s.client()
        for owner, text in ((client, SIGNATURES), (client.messages, CHANNEL_SIGNATURES)):
            for wanted in re.findall(r"\w+\([^()]*?(?:\)|,(?=\s+\w+\(|$))", text):
                name = wanted.partition("(")[0]     # a comma at the end: more may follow
                self.assertEqual(head(name, getattr(owner, name))[:len(wanted)], wanted)

    def test_channels_work_as_in_the_typescript_client(self):
        messages = self.s.client().messages
        first = messages.send(channel=self.channel, content="a", sender="s", ttl_seconds=60,
                              task_id="t", correlation_id="c", metadata={"x": 1})
        second = messages.send(self.channel, "b")
        self.assertEqual(messages.inbox(self.channel), [first, second])
        self.assertEqual(messages.inbox(self.channel, after_id=first["id"], limit=5), [second])
        self.assertEqual(messages.inbox(self.channel, sender="s", correlation_id="c", wait=5),
                         [first])
        self.assertEqual(messages.ack(first["id"])["status"], "acked")
        self.assertEqual(len(messages.inbox(self.channel, include_acked=True)), 2)
        held, = messages.lease(self.channel, "w")
        self.assertEqual(messages.extend(held["id"], held["leaseToken"], 9)["leasedBy"], "w")
        self.assertEqual(messages.release(held["id"], held["leaseToken"]), second)
        self.assertEqual((messages.dead(self.channel), messages.revive(second["id"])), ([], second))
        self.assertEqual(messages.reply(second["id"], "re")["content"], "re")
        self.assertEqual(messages.pending(self.channel), 0)
        self.assertEqual(messages.ack_all("api"), {"channel": "api", "ackedCount": 1})
        self.assertEqual(sorted(messages.gc(acked_older_than_hours=0)), ["acked", "expired"])

    def test_a_refusal_is_one_exception_with_status_code_message_and_details(self):
        messages = self.s.client().messages
        error = self.fails(messages.ack, 99999999)
        self.assertEqual((error.status, error.code, error.message, error.details),
                         (404, "message_not_found", "Message not found: 99999999", None))
        error = self.fails(messages.send, "", "", ttl_seconds=0)
        self.assertEqual((error.status, {row["field"] for row in error.details}),
                         (400, {"channel", "content", "ttlSeconds"}))
        self.assertEqual(self.fails(messages.ack, "7/../../gc").status, 400)

    def test_not_now_is_tried_again_after_as_long_as_it_says_with_the_same_key(self):
        server, client, sleeps = self.scripted(BUSY, LATER, http_answer(201, {"id": 5}))
        self.assertEqual(client.messages.send("c", "x"), {"id": 5})
        self.assertEqual((sleeps, len(server.keys())), ([7.0, 3.0], 1))
        _, client, sleeps = self.scripted(LATER.replace(b"After: 3", b"After: 86400"))
        self.assertEqual((self.fails(client.messages.send, "c", "x").status, sleeps), (429, []))

    def test_an_eaten_answer_is_no_double(self):
        def pass_on(request):
            return self.s.raw(request, half_close=True)

        def eat(request):
            pass_on(request)
            return b""
        server, client, sleeps = self.scripted(eat, pass_on)
        sent = client.messages.send(self.channel, "once")
        self.assertEqual((self.read(), len(sleeps), len(server.keys())), ([sent], 1, 1))
        session, keys = self.s.session()
        server, client, sleeps = self.scripted(eat, eat, pass_on)
        client.send(session, "ada", "once", session_key=keys["ada"])
        stored = self.s.poll(session, "ada").json["messages"]
        self.assertEqual((len(stored), len(sleeps), len(server.keys())), (1, 2, 1))
        question = self.put(sender=self.channel + "-back")
        self.scripted(eat, pass_on)[1].messages.reply(question["id"], "once")
        self.assertEqual(self.count(self.channel + "-back"), 1)

    def test_after_four_attempts_with_doubling_pauses_the_error_comes_through(self):
        first = set()
        for answer, code in ((BUSY, "server_busy"), (b"", "unreachable"), (b"", "unreachable"),
                             (BROKEN, "internal_error")):
            server, client, sleeps = self.scripted(*[answer] * 4)
            self.assertEqual(self.fails(client.messages.send, "c", "x").code, code)
            self.assertEqual((len(server.requests), len(sleeps), len(server.keys())), (4, 3, 1))
            for pause, rest in zip((0.2, 0.4, 0.8) if answer != BUSY else (14, 14, 14), sleeps):
                self.assertTrue(pause * 0.5 <= rest <= pause * 1.5, sleeps)
            first.add(sleeps[0])
        self.assertGreater(len(first), 2, "no jitter")

    def test_what_may_not_happen_twice_is_repeated_only_if_it_never_arrived(self):
        for name, args in (("claim", ("c", "a")), ("create", ()), ("leave", ("s", "a", "k")),
                           ("messages.lease", ("c", "w")), ("messages.ack", (1,)),
                           ("messages.ack_all", ("c",))):
            for answer, code in ((b"", "unreachable"), (b"HTTP/1.1 200 OK\r\n", "unreachable"),
                                 (BROKEN, "internal_error")):
                server, target, sleeps = self.scripted(answer, http_answer(200, {}))
                for part in name.split("."):
                    target = getattr(target, part)
                self.assertEqual(self.fails(target, *args).code, code, name)
                self.assertEqual((len(server.requests), sleeps), (1, []), name)
        for method, path, values, count in (        # the same for tools, which have no methods
                ("GET", "/v1/sessions/s", {"sessionId": "s"}, 2),
                ("POST", "/api/messages", {"channel": "c", "content": "x"}, 2),
                ("POST", "/v1/sessions/s/join", {"sessionId": "s", "agentId": "a"}, 1)):
            server, client, _ = self.scripted(b"", http_answer(200, {}))
            with contextlib.suppress(nexus.NexusError):
                client.perform(nexus.find(method, path)[0], values)
            self.assertEqual(len(server.requests), count, path)
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = "http://127.0.0.1:%d" % free.getsockname()[1]
        sleeps = []
        error = self.fails(nexus.Client(url, sleep=sleeps.append).claim, "c", "a")
        self.assertEqual((error.code, len(sleeps)), ("unreachable", 3))

    def test_what_may_happen_twice_is_repeated(self):
        for name, args in (("renew", ("s", "a")), ("pair", ("s",)), ("join", ("s", "a", "k")),
                           ("send", ("s", "a", "x")), ("messages.revive", (1,)),
                           ("messages.extend", (1, "t", 9)), ("messages.reply", (1, "x"))):
            server, target, sleeps = self.scripted(BROKEN, b"", http_answer(200, {"message": 1}))
            for part in name.split("."):
                target = getattr(target, part)
            target(*args)
            self.assertEqual((len(server.requests), len(sleeps)), (3, 2), name)
        self.assertEqual(self.fails(self.scripted(BROKEN)[1].join, "s", "a").status, 500)

    def test_the_time_of_a_try_is_for_all_of_it_however_the_server_dribbles(self):
        def dribble(line):              # a whole answer, if one waits for it for two seconds
            for byte in http_answer(200, {"status": "healthy", "sessionId": "x", "agents": []}):
                yield bytes([byte])
                time.sleep(0.02)
        slow, home = Fake(self, dribble), self.folder()
        client = nexus.Client(slow.url, timeout=0.2, patience=-1)
        self.assertEqual(self.fails(client.health).code, "unreachable")
        nexus.State(home).put("s", "server", slow.url)
        ran = run_here(home, "ls", NEXUS_STATUS_TIMEOUT="0.2")
        self.assertEqual(ran.json["sessions"][0]["status"], "unreachable")
        ran = run_here(home, "doctor", NEXUS_STATUS_TIMEOUT="0.2", url=slow.url)
        self.assertEqual((ran.json["health"][0]["reachable"], ran.json["sessions"][0]["httpCode"]),
                         (False, 0))
        given = []
        with patched(nexus.socket, "getaddrinfo", lambda *_, **__: [None] * 4), patched(
                nexus.socket, "create_connection", lambda _, seconds: given.append(seconds) or 1/0):
            self.assertRaises(ZeroDivisionError, client.health)
        self.assertAlmostEqual(given[0], 0.05, 2)   # of four addresses each gets its share

    def test_a_degraded_server_is_asked_once_and_says_why(self):
        ill = http_answer(503, {"status": "degraded", "reason": "the disk is full", "uptime": 7})
        _, client, sleeps = self.scripted(ill)
        self.assertEqual((client.health(), sleeps), (
            {"status": "degraded", "reason": "the disk is full", "uptime": 7}, []))
        _, client, sleeps = self.scripted(BUSY, http_answer(200, {"status": "healthy"}))
        self.assertEqual((client.health(), sleeps), ({"status": "healthy"}, [7.0]))

    def test_lists_say_whether_there_is_more_if_the_server_does(self):
        for more in (True, False, None):
            answer = http_answer(200, dict({"messages": [], "channel": "c", "count": 0},
                                           **({} if more is None else {"more": more})))
            messages = self.scripted(answer, answer)[1].messages
            for page in (messages.inbox("c"), messages.dead("c")):
                self.assertEqual((page, page.more), ([], more))

    def test_odd_values_are_left_out_or_made_harmless(self):
        server, client, _ = self.scripted(*[http_answer(200, {"messages": [], "x": 1})] * 3)
        client.messages.inbox("c", include_acked=False)
        client.poll("s", "a\r\nX-Evil: 1\u2603", members=True, after="0")
        client.send("s", "", json=False, session_key="", idempotency_key="")
        heads = [request.decode("latin-1") for request in server.requests]
        self.assertIn("GET /api/messages/inbox/c?wait=0 HTTP", heads[0])
        self.assertIn("?after=0&members=true HTTP", heads[1])
        self.assertIn("X-Agent-Id: a  X-Evil: 1\\u2603\r\n", heads[1])
        self.assertNotRegex(heads[2], "Agent|Session")
        self.assertRegex(heads[2], r'Idempotency-Key: [0-9a-f]{32}\r(?s:.*){"json":false}$')

    def test_answers_come_in_any_form_and_what_was_cut_off_is_never_believed(self):
        body, good = b'{"channel":"c","count":41}', http_answer(200, {"count": 7})
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        whole = b"3;x=y\r\n%s\r\n17\r\n%s\r\n0\r\nTrailer: x\r\n\r\n" % (body[:3], body[3:])
        for answer, count in (
                (chunked + whole, 41), (b"HTTP/1.0 200 OK\r\n\r\n" + body, 41),
                (b"HTTP/1.1 100 Continue\r\n\r\n" * 2000 + http_answer(200, body), 41),
                (http_answer(200, body)[:-1], 7), (chunked + b"1A\r\n" + body[:9], 7),
                (chunked + b"zz\r\n" + body, 7), (b"SSH-2.0-x\r\n", 7), (b"HTTP/1.1 2", 7),
                (b"HTTP/1.1 200 OK\r\n", 7), (http_answer(502, b"bad gateway"), 7)):
            with self.subTest(answer=answer[:70]):
                _, client, sleeps = self.scripted(answer, good)
                self.assertEqual((client.messages.pending("c"), len(sleeps)), (count, count == 7))

    def test_an_answer_that_is_no_json_of_ours_is_the_same_kind_of_error(self):
        for body in (b"<html>hotel wifi</html>", b"[]", b'"x"', b"null", b"{", b"\xff",
                     b'{"a":' * 100000):
            with self.subTest(body=body[:30]):
                self.fails(self.scripted(http_answer(200, body))[1].messages.pending, "c")
        for body in ([], {"message": "x"}, "x", None):
            self.assertEqual(self.fails(self.scripted(http_answer(404, body))[1].health).status,
                             404)
        for details in ("x", 5, [5, None], [{}], {"field": "x"}):
            refusal = http_answer(400, {"error": "invalid_request", "details": details})
            ran = run_here(self.folder(), "status", "x", url=self.scripted(refusal)[0].url)
            self.assertEqual((ran.code, ran.json["error"]), (2, "invalid_request"))


class Doorman:
    """A port that looks at what each connection says first: rule(those bytes) is what it hears
    back, then the end; None is silence, a number the port that it is led on to."""

    def __init__(self, case, rule):
        self._rule, self._listener = rule, socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        case.addCleanup(self._stop)

    def _stop(self):
        with contextlib.suppress(OSError), self._listener:
            self._listener.shutdown(socket.SHUT_RDWR)

    def _accept(self):
        with contextlib.suppress(OSError):      # until it is shut down
            while True:
                sock = self._listener.accept()[0]
                threading.Thread(target=self._meet, args=(sock,), daemon=True).start()

    def _meet(self, sock):
        with contextlib.suppress(OSError), sock:
            first = sock.recv(65536)
            found = self._rule(first)
            if isinstance(found, int):
                with socket.create_connection(("127.0.0.1", found)) as other:
                    other.sendall(first)
                    back = Started(self._pump, other, sock)
                    self._pump(sock, other)
                    back.result()
            elif found is not None:
                sock.sendall(found)
            else:
                while sock.recv(65536):
                    pass

    @staticmethod
    def _pump(source, target):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


class RightScheme(Case):
    """https to a port of http and the reverse are told as such, at once, with the right URL."""

    HTML = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 6\r\n\r\n<html>"
    ALERT = b"\x15\x03\x01\x00\x02\x02\x46"

    def setUp(self):
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(patched(nexus, "HELLO_SECONDS", 0.4))
        # The machine's certificates take 50 ms to load, and no handshake here gets as far.
        stack.enter_context(patched(nexus.ssl.SSLContext, "load_default_certs", lambda *_: None))

    def door(self, tls, plain):
        """The port of a Doorman: what is said to a TLS handshake, and to anything else."""
        return Doorman(self, lambda first: tls if first[:1] == b"\x16" else plain).port

    def fails(self, code, url, verb="health", timeout=10, **options):
        """The message of the refusal; it came at once, without a second try."""
        sleeps = []
        client = nexus.Client(url, sleep=sleeps.append, timeout=timeout, **options)
        with self.assertRaises(nexus.NexusError) as caught:
            getattr(client, verb)()
        self.assertEqual(caught.exception.code, code, (url, caught.exception.message))
        self.assertEqual(len(sleeps), 0 if code == "wrong_scheme" else 3)
        return caught.exception.message

    def test_https_to_a_port_of_http(self):
        http = self.server().port
        for port in (http, self.door(None, http), self.door(b"", http), self.door(self.HTML, http)):
            for verb in ("health", "create"):
                self.assertIn(" http://127.0.0.1:%d/x." % port, self.fails(
                    "wrong_scheme", "https://127.0.0.1:%d/x/" % port, verb))
            ran = run_here(self.folder(), "tx", "inbox", "c", url="https://127.0.0.1:%d" % port)
            self.assertEqual((ran.code, ran.out), (1, ""))
            self.assertIn("http://127.0.0.1:%d" % port, ran.err)
            self.assertNotIn("nexus.py serve", ran.err)

    @unittest.skipUnless(shutil.which("openssl"), "openssl is not here")
    def test_http_to_a_port_of_https(self):
        cert, key = make_certificate(self.folder())
        https = self.server(tls_cert=cert, tls_key=key).port
        for port in (https, self.door(https, b""), self.door(https, self.HTML),
                     self.door(https, self.ALERT)):
            for verb in ("health", "create"):
                with patched(nexus, "HELLO_SECONDS", 10):       # nobody here is silent
                    self.assertIn(" https://127.0.0.1:%d." % port, self.fails(
                        "wrong_scheme", "http://127.0.0.1:%d" % port, verb))

    def test_a_port_that_speaks_neither_is_unreachable(self):
        for tls, plain in ((b"", b""), (self.ALERT, b""), (b"", self.ALERT), (None, None),
                           (b"", b"SSH-2.0-x\r\n"), (b"", self.HTML)):
            for scheme in ("https",) if plain == self.HTML else ("http", "https"):
                url = "%s://127.0.0.1:%d" % (scheme, self.door(tls, plain))
                self.assertIn("nexus.py serve", self.fails("unreachable", url, timeout=0.05))

    @unittest.skipUnless(shutil.which("openssl"), "openssl is not here")
    def test_a_slow_handshake_is_not_given_up(self):
        cert, key = make_certificate(self.folder())
        https, looked = self.server(tls_cert=cert, tls_key=key).port, threading.Event()

        def rule(first):
            if first[:1] == b"\x16":
                looked.wait(10)
                return https
            looked.set()
            return self.HTML
        client = nexus.Client("https://127.0.0.1:%d" % Doorman(self, rule).port, ca=cert,
                              patience=-1)
        self.assertEqual(client.health()["status"], "healthy")
        self.assertTrue(looked.is_set())


# ----------------------------------------------------------------------------------------
# MCP over HTTP
#
# One dispatcher, two generations of clients. A failed operation is a result that an agent can act
# on; only what is wrong with the call itself is a protocol error.
# ----------------------------------------------------------------------------------------

READING_TOOLS = {"tx_inbox", "tx_channels", "tx_outbox_pending", "nexus_poll", "nexus_status",
                 "nexus_sessions"}
SERVER_TOOLS = {
    "tx_send": "channel content sender taskId ttlSeconds correlationId metadata",
    "tx_inbox": "channel afterId limit sender correlationId includeAcked wait",
    "tx_ack": "id leaseToken", "tx_ack_all": "channel", "tx_outbox_pending": "channel",
    "tx_lease": "channel consumer limit leaseSeconds wait", "tx_reply": "id content",
    "tx_release": "id leaseToken delaySeconds", "tx_extend": "id leaseToken leaseSeconds",
    "tx_channels": "prefix after limit",
    "tx_ask": "channel content sender timeoutSeconds", "nexus_pair": "sessionId",
    "nexus_create": "ttl maxAgents greeting creatorAgentId", "nexus_claim": "code agentId",
    "nexus_join": "sessionId agentId", "nexus_send": "sessionId agentId text json",
    "nexus_poll": "sessionId agentId after limit members wait others", "nexus_status": "sessionId",
    "nexus_leave": "sessionId agentId"}
OLDER = ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"]
META = "io.modelcontextprotocol/protocolVersion"
NEWER = {"_meta": {META: "2026-07-28"}}
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}


def check_tools(case, tools, names):
    """The definitions are complete, small, and exactly these."""
    case.assertEqual(sorted(tool["name"] for tool in tools), sorted(names))
    case.assertLess(len(json.dumps(tools, separators=(",", ":")).encode()), 7000)
    for tool in tools:
        schema, hints, name = tool["inputSchema"], tool["annotations"], tool["name"]
        case.assertEqual(schema["type"], "object", tool)
        case.assertFalse({"oneOf", "anyOf", "allOf"} & set(schema), tool)
        case.assertFalse({"acks", "idempotencyKey"} & set(schema["properties"]), tool)
        case.assertLessEqual(set(schema.get("required", [])), set(schema["properties"]), tool)
        case.assertLessEqual(set(SERVER_TOOLS.get(name, "").split()), set(schema["properties"]))
        case.assertEqual({hint: type(value) for hint, value in hints.items()}, dict.fromkeys(
            ("destructiveHint", "idempotentHint", "openWorldHint", "readOnlyHint"), bool))
        case.assertEqual(hints["readOnlyHint"], name in READING_TOOLS, name)
        case.assertTrue(tool["description"])
        if name == "tx_send":
            case.assertEqual(schema["properties"]["metadata"]["type"], "string")


class McpOverHttp(ServerCase):
    """POST /mcp"""

    def rpc(self, method, params=None):
        """One request: its result."""
        answer = self.s.call("POST", "/mcp", dict(PING, id="q", method=method, params=params or {}))
        self.assertEqual((answer.status, answer.headers["content-type"]),
                         (200, "application/json"))
        self.assertEqual((answer.json["jsonrpc"], answer.json["id"]), ("2.0", "q"))
        return answer.json["result"]

    def tool(self, tool, failed=False, **arguments):
        """Call a tool: the JSON of its text."""
        result = self.rpc("tools/call", {"name": tool, "arguments": arguments})
        content, = result["content"]
        self.assertEqual((content["type"], result["isError"]), ("text", failed), content)
        return json.loads(content["text"])

    def test_the_handshake_echoes_a_known_version_and_else_offers_the_newest(self):
        for asked in OLDER + ["1999-01-01", None, 7]:
            result = self.rpc("initialize", {"protocolVersion": asked, "capabilities": {},
                                             "clientInfo": {"name": "t", "version": "1"}})
            self.assertEqual(result["protocolVersion"], asked if asked in OLDER else OLDER[-1])
            self.assertIn("tools", result["capabilities"])
            self.assertEqual(result["serverInfo"], {"name": "nexus", "version": nexus.VERSION})
        self.assertEqual(self.rpc("ping"), {})

    def test_the_newer_generation_needs_no_handshake_and_gets_its_marks(self):
        older, newer = self.rpc("tools/list"), self.rpc("tools/list", NEWER)
        check_tools(self, older["tools"], SERVER_TOOLS)
        self.assertEqual((list(older), newer["tools"]), (["tools"], older["tools"]))
        found = self.rpc("server/discover", NEWER)
        self.assertLessEqual({"2026-07-28"} | set(OLDER), set(found["supportedVersions"]))
        self.assertIn("tools", found["capabilities"])
        self.assertEqual(found["instructions"], self.rpc("initialize")["instructions"])
        for result in (found, newer):
            self.assertIs(type(result["ttlMs"]), int)
            self.assertIn(result["cacheScope"], ("public", "private"))
        called = self.rpc("tools/call", dict(NEWER, name="tx_outbox_pending",
                                             arguments={"channel": "newer"}))
        self.assertEqual([r["resultType"] for r in (found, newer, called)], ["complete"] * 3)
        body = dict(PING, params={"_meta": {META: "2031-01-01"}})
        error = self.s.call("POST", "/mcp", body).json["error"]
        self.assertEqual(error["code"], -32022)
        self.assertIn("2026-07-28", error["data"]["supported"])

    def test_what_wants_no_answer_gets_none_and_get_is_told_what_is_allowed(self):
        for body in ({"method": "notifications/initialized"}, {"method": "unheard/of"},
                     {"method": "notifications/cancelled"}, {"id": 1, "result": {}}):
            answer = self.s.call("POST", "/mcp", dict(body, jsonrpc="2.0"))
            self.assertEqual((answer.status, answer.text), (202, ""))
        answer = self.s.call("GET", "/mcp")
        self.expect(answer, 405, "method_not_allowed")
        self.assertEqual(answer.headers["allow"], "POST")

    def test_what_is_wrong_with_the_call_itself_is_a_protocol_error(self):
        def call(params, **more):
            return dict(dict(PING, id=5, method="tools/call", params=params), **more)
        for body, status, number, code in (
                (b"{", 400, None, -32700), (b"", 400, None, -32700), (b"\xff", 400, None, -32700),
                (b"[" * 5000, 400, None, -32700), ([call({}), call({})], 400, None, -32600),
                ([], 400, None, -32600), (dict(PING, jsonrpc="1"), 400, None, -32600),
                (dict(PING, method=1), 400, None, -32600), (dict(PING, id=None), 400, None, -32600),
                (dict(PING, id={}), 400, None, -32600),
                (call({}, method="nope"), 200, 5, -32601), (call({}), 200, 5, -32602),
                (call(NEWER, method="nope"), 200, 5, -32601), (call([1]), 200, 5, -32602),
                (call({"name": "nope"}), 200, 5, -32602), (call({"name": 7}), 200, 5, -32602),
                (call({"name": "nexus_sessions"}), 200, 5, -32602),
                (call({"name": "tx_ack", "arguments": [1]}), 200, 5, -32602),
                (call("x", id="5"), 200, "5", -32602)):
            with self.subTest(body=str(body)[:80]):
                answer = self.s.call("POST", "/mcp", body)
                self.assertTrue(answer.json["error"]["message"])
                self.assertEqual((answer.status, answer.json["id"], answer.json["error"]["code"]),
                                 (status, number, code))

    def test_a_refused_operation_is_a_result_that_says_what_to_do(self):
        refused = self.tool("tx_ack", True, id=99999999)
        self.assertEqual((refused["error"], refused["message"]),
                         ("message_not_found", "Message not found: 99999999"))
        refused = self.tool("tx_send", True, channel="", metadata={"a": 1}, ttlSeconds="x")
        self.assertEqual({row["field"] for row in refused["details"]},
                         {"channel", "content", "ttlSeconds"})
        refused = self.tool("tx_send", True, channel="c", content="x", metadata="{nope")
        self.assertEqual(refused["details"][0]["field"], "metadata")
        self.assertEqual(self.tool("nexus_send", True, sessionId="0" * 48, text="x")["error"],
                         "missing_agent_id")

    def test_host_origin_and_token_are_checked(self):
        with Server(token="t0ken") as guarded:
            for server, headers, status, code in (
                    (self.s, {"Host": "evil.example"}, 403, "host_not_allowed"),
                    (self.s, {"Origin": "http://evil.example"}, 403, "origin_not_allowed"),
                    (guarded, {}, 401, "unauthorized"),
                    (guarded, {"Authorization": "Bearer wrong"}, 401, "unauthorized"),
                    (guarded, {"Authorization": "Bearer t0ken"}, 200, None),
                    (guarded, {"X-Api-Key": "t0ken"}, 200, None)):
                self.expect(server.call("POST", "/mcp", PING, headers=headers), status, code)

    def test_channels_ask_and_reply_work_as_tools(self):
        sent = self.tool("tx_send", channel="m", content="x", metadata='{"priority":"high"}',
                         taskId="t", correlationId="c", ttlSeconds=3600)
        self.assertEqual((sent["sender"], sent["metadata"]), ("mcp", {"priority": "high"}))
        self.assertEqual(self.tool("tx_inbox", channel="m", afterId=0, limit=10, sender="mcp",
                                   correlationId="c", includeAcked=False)["messages"], [sent])
        self.assertEqual(self.tool("tx_outbox_pending", channel="m")["count"], 1)
        held, = self.tool("tx_lease", channel="m", consumer="w")["messages"]
        self.assertEqual(self.tool("tx_ack", True, id=sent["id"], leaseToken="no")["error"],
                         "lease_expired")
        acked = self.tool("tx_ack", id=sent["id"], leaseToken=held["leaseToken"])["message"]
        self.assertEqual(acked["status"], "acked")
        asked = Started(self.tool, "tx_ask", channel="m", content="well?", timeoutSeconds=30)
        question, = self.tool("tx_inbox", channel="m", wait=10)["messages"]
        reply = self.tool("tx_reply", id=question["id"], content="yes")
        self.assertEqual([reply[name] for name in ("sender", "correlationId")],
                         ["mcp", question["correlationId"]])
        self.assertEqual(asked.result()["content"], "yes")
        vain = self.tool("tx_ask", True, channel="m", content="again?", timeoutSeconds=0)
        self.assertEqual((vain["error"], vain["question"]["content"], vain["question"]["status"]),
                         ("no_reply", "again?", "pending"))
        self.assertIn("--resume %d" % vain["question"]["id"], vain["resume"])
        self.assertEqual(self.tool("tx_ack_all", channel="m")["ackedCount"], 1)

    def test_a_conversation_needs_no_file(self):
        made = self.tool("nexus_create", creatorAgentId="ada", greeting="hi")
        session = {"sessionId": made["sessionId"]}
        code = self.tool("nexus_pair", **session)["code"]
        bob = self.tool("nexus_claim", code=code, agentId="bob")["sessionKey"]
        self.tool("nexus_join", agentId="cy", **session)
        self.tool("nexus_send", agentId="bob", sessionKey=bob, text="hello", json=[1], **session)
        self.tool("nexus_send", True, agentId="bob", sessionKey="wrong", text="x", **session)
        polled = self.tool("nexus_poll", agentId="ada", members=True, **session)
        self.assertEqual([(m["text"], m.get("json"), m["verified"]) for m in polled["messages"]][1],
                         ("hello", [1], True))
        self.assertEqual(len(polled["members"]), 3)
        self.tool("nexus_leave", agentId="bob", sessionKey=bob, **session)
        self.assertEqual(self.tool("nexus_status", **session)["agents"], ["ada", "cy"])


# ----------------------------------------------------------------------------------------
# MCP over stdio
#
# A process that reads lines and writes lines: whatever comes in, what goes out is JSON-RPC, no
# call holds up another, and when the input ends so does the process. Agents with homes of their
# own talk through it, and it remembers for them what a language model should not have to.
# ----------------------------------------------------------------------------------------

    def test_refusals_are_in_the_words_of_tools(self):
        session = self.tool("nexus_create", creatorAgentId="ada")["sessionId"]
        for name, arguments, told in (
                ("nexus_poll", {"sessionId": session}, "agentId"),
                ("nexus_join", {"sessionId": session, "agentId": "a b"}, "agentId must match"),
                ("nexus_leave", {"sessionId": session, "agentId": "ada"}, "sessionKey")):
            refusal = self.tool(name, failed=True, **arguments)
            self.assertIn(told, refusal["message"])
            self.assertNotRegex(json.dumps(refusal), "X-|header")
        for _ in range(nexus.CODE_MISSES_PER_ADDRESS + 1):
            refusal = self.tool("nexus_claim", failed=True, code="PEARL-FOCAL-00000", agentId="a")
        self.assertRegex(refusal["message"], r"Wait \d+ s\.")


class McpProcess:
    """`nexus.py mcp` with a home of its own; answers are collected by their id."""

    def __init__(self, url, home):
        self.answers, self._last = [], 0
        self.process = subprocess.Popen(
            COMMAND + ["mcp", "--url", url], cwd=home, env=clean_environment(home),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._reader = Started(self._read)

    def _read(self):
        for line in self.process.stdout:
            self.answers.append(json.loads(line.decode("utf-8")))   # else end() raises

    def write(self, data):
        """Raw bytes, or a message (without its "jsonrpc") as one line."""
        if not isinstance(data, bytes):
            data = json.dumps(dict(data, jsonrpc="2.0"), ensure_ascii=False).encode() + b"\n"
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def start(self, method, params=None, number=None):
        """Send a request; returns its id."""
        self._last += 1
        number = self._last if number is None else number
        self.write({"id": number, "method": method, "params": params or {}})
        return number

    def find(self, number):
        """The answers with this id so far; 1 and "1" are two ids."""
        return [answer for answer in list(self.answers) if repr(answer["id"]) == repr(number)]

    def answer(self, number, count=1):
        """The answer with this id, once it is there; or the count-th of them."""
        until(lambda: len(self.find(number)) >= count or self._reader.done())
        found = self.find(number)
        if len(found) < count:
            raise AssertionError("no answer to %r" % (number,))
        return found[count - 1]

    def rpc(self, method, params=None):
        """A request and its result."""
        return self.answer(self.start(method, params))["result"]

    def start_tool(self, tool, number=None, **arguments):
        """Begin a tool call; returns its id."""
        return self.start("tools/call", {"name": tool, "arguments": arguments}, number)

    def text_of(self, number, failed=False):
        """The JSON in a tool's answer."""
        answer = self.answer(number)
        if answer.get("result", {}).get("isError") is not failed:
            raise AssertionError(answer)
        return json.loads(answer["result"]["content"][0]["text"])

    def tool(self, tool, failed=False, **arguments):
        """Call a tool: the JSON of its answer."""
        return self.text_of(self.start_tool(tool, **arguments), failed)

    def end(self):
        """Close its input: its exit code. All that it wrote was JSON-RPC."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        code = self.process.wait(10)
        self._reader.result()
        self.process.stdout.close()
        for answer in self.answers:
            if answer["jsonrpc"] != "2.0" or ("result" in answer) == ("error" in answer):
                raise AssertionError(answer)
        return code


class McpOverStdio(ServerCase):
    """nexus.py mcp; one process for all tests that do not end it."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.home = tempfile.mkdtemp(prefix="nexus-test-")
        cls.mcp = McpProcess(cls.s.url, cls.home)

    @classmethod
    def tearDownClass(cls):
        code = cls.mcp.end()
        shutil.rmtree(cls.home, True)
        super().tearDownClass()
        if code:
            raise AssertionError("nexus.py mcp ended with %d" % code)

    def other(self):
        """Another process, with a home of its own: (McpProcess, nexus.State)."""
        home = self.folder()
        mcp = McpProcess(self.s.url, home)
        self.addCleanup(mcp.end)
        return mcp, nexus.State(home)

    def waiting_poll(self, number=None):
        """A nexus_poll that waits: (session id, its id, a function that sends it a text)."""
        session, keys = self.s.session(("ada", "bob"))
        before = self.s.store.waiters.parked
        number = self.mcp.start_tool("nexus_poll", number, sessionId=session, agentId="bob",
                                     wait=30)
        until(lambda: self.s.store.waiters.parked > before)
        return session, number, lambda text: self.s.send(session, "ada", text, keys["ada"])

    def cancel(self, number):
        """Cancel a request, and wait until that was read."""
        for params in ({"requestId": number, "reason": "bored"}, {"requestId": "unknown"}, {}, []):
            self.mcp.write({"method": "notifications/cancelled", "params": params})
        self.assertEqual(self.mcp.rpc("ping"), {})

    def test_the_tools_are_those_of_the_contract(self):
        for asked in OLDER:
            self.assertEqual(self.mcp.rpc("initialize", {"protocolVersion": asked})[
                "protocolVersion"], asked)
        check_tools(self, self.mcp.rpc("tools/list")["tools"],
                    set(SERVER_TOOLS) | {"nexus_sessions"})
        self.assertEqual(self.mcp.rpc("server/discover", NEWER)["resultType"], "complete")

    def test_two_agents_with_homes_of_their_own_talk(self):
        ada, (bob, state) = self.mcp, self.other()
        session = ada.tool("nexus_create", creatorAgentId="ada", greeting="hi")["sessionId"]
        link = ada.tool("nexus_pair", sessionId=session)["url"]
        self.assertEqual(bob.tool("nexus_claim", code=link.lower(), agentId="bob")["sessionId"],
                         session)
        nexus.State(self.home).set_alias("review", session)
        ada.tool("nexus_send", sessionId="review", text="Ünï 🦊\u2028", json={"a": [1, None]})
        poll = bob.tool("nexus_poll", sessionId=session)
        self.assertEqual([(m["text"], m["verified"]) for m in poll["messages"]],
                         [("hi", True), ("Ünï 🦊\u2028", True)])
        self.assertEqual(bob.tool("nexus_poll", sessionId=session)["messages"], [])
        replay = bob.tool("nexus_poll", sessionId=session, after="0")["messages"]
        self.assertEqual((len(replay), state.get(session, "cursor")), (2, "1"))
        waiting = bob.start_tool("nexus_poll", sessionId=session, wait=30)
        ada.tool("nexus_send", sessionId="review", text="more")
        self.assertEqual([m["text"] for m in bob.text_of(waiting)["messages"]], ["more"])
        self.assertEqual(bob.tool("nexus_sessions")["sessions"], [
            {"sessionId": session, "alias": None, "agentId": "bob", "cursor": "2",
             "server": self.s.url}])
        bob.tool("nexus_leave", sessionId=session)
        self.assertEqual((bob.tool("nexus_sessions")["sessions"], state.sessions()), ([], []))
        self.assertEqual(ada.tool("nexus_status", sessionId="review")["agents"], ["ada"])
        self.assertEqual(bob.tool("nexus_poll", True, sessionId=session)["error"],
                         "missing_agent_id")

    def test_channels_make_the_round_trip_and_a_large_answer_is_one_line(self):
        text = "🦊\n" * 100000
        sent = self.mcp.tool("tx_send", channel="a/b ü", content=text, metadata='{"a": 1}')
        self.assertEqual([sent[name] for name in ("content", "sender", "metadata")],
                         [text, "mcp", {"a": 1}])
        self.assertEqual(self.mcp.tool("tx_inbox", channel="a/b ü")["messages"], [sent])
        self.mcp.tool("tx_ack", id=sent["id"])
        self.assertEqual(self.mcp.tool("tx_ack", True, id=sent["id"])["error"],
                         "message_already_acked")
        self.assertEqual(self.mcp.tool("tx_ask", True, channel="a", content="x",
                                       timeoutSeconds=0)["error"], "no_reply")

    def test_huge_split_and_broken_lines_do_not_stop_it(self):
        before = len(self.mcp.find(None))
        for line, code in ((b"not json\n", -32700), (b"\xff\xfe\n", -32700),
                           (b'"' + b"x" * (nexus.LINE_BYTES + 9) + b'"\n', -32700),
                           (b"[]\n", -32600), (b"1\n", -32600)):
            count = len(self.mcp.find(None)) + 1
            self.mcp.write(line)
            self.assertEqual(self.mcp.answer(None, count)["error"]["code"], code, line[:20])
        self.mcp.write(b"\n  \r\n")
        self.mcp.write({"method": "notifications/initialized"})
        whole = b'{"jsonrpc":"2.0","id":"split","method":"ping"}\r\n'
        self.mcp.write(whole[:20])
        time.sleep(0.05)
        self.mcp.write(whole[20:])
        self.assertEqual(self.mcp.answer("split")["result"], {})
        self.assertEqual(len(self.mcp.find(None)), before + 5)      # one for each, however long

    def test_a_call_that_waits_holds_up_nothing(self):
        _, number, send = self.waiting_poll()
        self.assertEqual(self.mcp.rpc("ping"), {})
        self.assertEqual(self.mcp.tool("tx_outbox_pending", channel="x")["count"], 0)
        self.assertEqual(self.mcp.find(number), [])
        send("now")
        self.assertEqual(self.mcp.text_of(number)["messages"][0]["text"], "now")

    def test_the_ids_1_and_text_1_are_two_requests(self):
        _, number, send = self.waiting_poll(7000001)
        self.mcp.start("ping", number=str(number))
        self.assertEqual(self.mcp.answer(str(number))["result"], {})
        send("now")
        self.assertEqual(self.mcp.text_of(number)["messages"][0]["text"], "now")

    def test_a_cancelled_poll_is_not_answered_and_does_not_take_the_message_with_it(self):
        session, number, send = self.waiting_poll()
        state = nexus.State(self.home)
        state.put(session, "agent", "bob")
        self.cancel(number)
        send("important")
        with self.assertRaises(AssertionError):                     # the cursor must not move
            until(lambda: state.get(session, "cursor"), 0.2)
        self.assertEqual([m["text"] for m in self.mcp.tool("nexus_poll", sessionId=session)[
            "messages"]], ["important"])
        self.assertEqual(self.mcp.find(number), [])

    def test_a_key_is_used_for_its_own_agent_alone(self):
        session, keys = self.s.session(("ada", "bob"))
        state = nexus.State(self.home)
        state.put(session, "agent", "ada")
        state.put(session, "key", keys["ada"])
        for agent in ("ada", "bob"):
            self.mcp.tool("nexus_send", sessionId=session, agentId=agent, text="x")
        found = self.s.poll(session, "ada").json["messages"]
        self.assertEqual([row["verified"] for row in found], [True, False])

    def test_state_without_an_agent_is_a_refusal_and_no_fault(self):
        session, keys = self.s.session()
        nexus.State(self.home).put(session, "key", keys["ada"])
        self.assertEqual(self.mcp.tool("nexus_poll", True, sessionId=session)["error"],
                         "missing_agent_id")

    def test_when_the_input_ends_it_finishes_what_runs_and_ends_well(self):
        mcp, _ = self.other()
        session, _ = self.s.session()
        number = mcp.start_tool("nexus_poll", sessionId=session, agentId="ada", wait=30,
                                others=False)
        mcp.write(b'{"jsonrpc":"2.0","id":"half')
        end = Started(mcp.end)
        mcp.answer(None)                    # the rest of the line will not come any more
        self.s.send(session, "ada", "late")
        self.assertEqual(end.result(), 0)
        self.assertEqual(mcp.text_of(number)["messages"][0]["text"], "late")
        self.assertEqual(mcp.answer(None)["error"]["code"], -32700)


# ----------------------------------------------------------------------------------------
# Descriptions
#
# The OpenAPI document says of every operation what it takes and gives, and what the server gives
# is what the document says. Client, command line and tools are held against the same table.
# ----------------------------------------------------------------------------------------

KINDS = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float),
         "boolean": bool, "null": type(None)}


def misfits(value, schema, document, place="$"):
    """Where a value breaks a JSON Schema (of the words that our document uses), as a list."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    kinds = schema.get("type", list(KINDS))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(isinstance(value, KINDS[kind]) and (kind == "boolean") == isinstance(value, bool)
               for kind in kinds):
        return ["%s: %r is not %s" % (place, value, kinds)]
    found = []
    if isinstance(value, dict):
        found += ["%s.%s is missing" % (place, name) for name in schema.get("required", ())
                  if name not in value]
        for name, inner in schema.get("properties", {}).items():
            if name in value:
                found += misfits(value[name], inner, document, place + "." + name)
    if isinstance(value, list):
        for number, item in enumerate(value):
            found += misfits(item, schema.get("items", {}), document, "%s[%d]" % (place, number))
    return found


class Recorder(nexus.Client):
    """A client that talks to nobody and notes which operations it would have called."""

    reached = set()

    def request(self, method, path, *_, **__):
        """Note the operation; the answer has something for everybody."""
        self.reached.add(nexus.find(method, path)[0].name)
        message = dict(dict.fromkeys(FIELDS + LEASE_FIELDS, "x"), id=1, metadata={}, attempts=1)
        return dict(message, message=message, messages=[message], count=1, ackedCount=1,
                    expired=0, acked=0, channels=[],
                    results=[{"id": 1, "ok": True}])


class Descriptions(ServerCase):
    """GET /openapi.json, and what else is derived from or held against the operations."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.document = cls.s.call("GET", "/openapi.json").json
        cls.rows = {(method, path): row for path, item in cls.document["paths"].items()
                    for method, row in item.items()}

    @staticmethod
    def key(entry):
        """An operation's key in self.rows."""
        return entry.method.lower(), re.sub(r"\w+(?=})", lambda m: nexus.camel(m.group()),
                                            entry.path)

    def test_the_document_is_openapi_3_1(self):
        self.assertRegex(self.document["openapi"], r"^3\.1\.\d+$")
        self.assertTrue(self.document["info"]["title"] and self.document["info"]["version"])
        self.assertEqual(len({row["operationId"] for row in self.rows.values()}), len(self.rows))
        schemes = set(self.document["components"]["securitySchemes"])
        for (method, path), row in self.rows.items():
            with self.subTest(path=path, method=method):
                self.assertRegex(method + path, r"^(get|put|post|delete)/")
                places = [(p["in"], p["name"].lower()) for p in row["parameters"]]
                self.assertEqual(len(places), len(set(places)))
                self.assertEqual(sorted(p["name"] for p in row["parameters"] if p["in"] == "path"),
                                 sorted(re.findall(r"{([^}]+)}", path)))
                for p in row["parameters"]:
                    self.assertIn((p["in"], p["required"]), (
                        ("path", True), ("query", False), ("header", True), ("header", False)))
                    kind = p["schema"]["type"]
                    self.assertLessEqual({kind} if isinstance(kind, str) else set(kind), set(KINDS))
                for status, answer in row["responses"].items():
                    self.assertRegex(status, r"^([1-5]\d\d|default)$")
                    self.assertTrue(answer["description"])
                self.assertLessEqual({name for rule in row.get("security", ()) for name in rule},
                                     schemes)
                self.assertTrue(row.get("requestBody", row)["content" if "requestBody" in row
                                                            else "responses"])

    def test_every_reference_resolves_and_every_schema_is_used(self):
        used = set(re.findall(r'"\$ref": "#/components/schemas/(.*?)"', json.dumps(self.document)))
        there = set(self.document["components"]["schemas"])
        self.missing(used - there, "An answer is a %s, and no row of SHAPES says what is in it.")
        self.missing(there - used, "SHAPES has a row %s, which no answer is.")

    def test_every_operation_with_a_path_is_described(self):
        wanted = {self.key(entry) for entry in nexus.OPERATIONS if entry.path}
        self.assertEqual(wanted, set(self.rows))
        body = self.rows["post", "/mcp"]["requestBody"]     # any object: JSON-RPC says which
        self.assertEqual((body["required"], body["content"]["application/json"]["schema"]),
                         (True, {"type": "object"}))

    def test_the_checker_finds_what_does_not_fit(self):
        good = self.s.call("POST", "/api/messages", {"channel": "c", "content": "x"}).json
        schema = {"$ref": "#/components/schemas/Message"}
        self.assertEqual(misfits(good, schema, self.document), [])
        for bad in (dict(good, id="1"), dict(good, id=True), dict(good, metadata=[]),
                    dict(good, ackedAt=1), dict(good, redacted=[1]), {"id": 1}, [good], None):
            self.assertTrue(misfits(bad, schema, self.document), bad)

    def test_what_the_server_answers_fits_what_the_document_says(self):
        visited = set()

        def call(method, path, *args, **values):
            answer = self.s.call(method, path, *args, **values)
            key = self.key(nexus.find(method, path.partition("?")[0])[0])
            responses = self.rows[key]["responses"]
            described = responses.get(str(answer.status), responses["default"])["content"]
            kind = answer.headers["content-type"].split(";")[0]
            self.assertIn(kind, described, key)
            self.assertEqual(misfits(answer.json, described[kind].get("schema", {}),
                                     self.document), [], key)
            if answer.status < 300:
                visited.add(key)
            return answer.json
        made = call("PUT", "/v1/sessions", {"creatorAgentId": "ada", "greeting": TOKEN})
        call("PUT", "/v1/sessions")
        base = "/v1/sessions/" + made["sessionId"]
        call("GET", base)
        call("POST", base + "/join", agent="bob")
        call("POST", base + "/messages", {"text": TOKEN, "json": [1]}, "ada", made["sessionKey"])
        call("GET", base + "/messages?members=true", agent="bob")
        call("POST", base + "/renew", agent="bob")
        code = call("PUT", "/v1/pair", {"sessionId": made["sessionId"]})["code"]
        for path in ("/v1/pair/%s/status", "/v1/pair/%s/skill", "/p/%s", "/p/%s/qr.svg"):
            call("GET", path % code)
        url = call("PUT", base + "/watch", agent="ada", key=made["sessionKey"])["url"]
        call("GET", "/v1/watch", headers={"X-Watch-Token": url.partition("#")[2]})
        call("DELETE", base + "/watch", agent="ada", key=made["sessionKey"])
        key = call("POST", "/v1/pair/%s/claim" % code, agent="cy")["sessionKey"]
        call("DELETE", base + "/agents/cy", agent="cy", key=key)
        for path in ("/", "/health", "/v1/stats", "/metrics", "/openapi.json", "/talk", "/w",
                     "/watch"):
            call("GET", path)
        sent = call("POST", "/api/messages", {"channel": "d", "content": TOKEN, "taskId": "t"})
        inbox, on = "/api/messages/inbox/d", "/api/messages/%d/" % sent["id"]
        held, = call("POST", inbox + "/lease", {"consumer": "w"})["messages"]
        token = {"leaseToken": held["leaseToken"]}
        call("POST", on + "extend", dict(token, leaseSeconds=9))
        call("POST", on + "release", token)
        for path in (inbox, inbox + "/dead", inbox + "/count"):
            call("GET", path)
        for path, body in ((on + "revive", None), (on + "reply", {"content": "re"}),
                           (inbox + "/ack", None), ("/api/messages/inbox/api/lease",
                                                    {"consumer": "w"}),
                           ("/api/messages/%d/ack" % (sent["id"] + 1), None),
                           ("/api/messages/gc", {"ackedOlderThanHours": 0})):
            call("POST", path, body)
        call("POST", "/api/messages/batch", {"messages": [{"channel": "e", "content": TOKEN}]})
        call("POST", "/api/messages/ack", {"acks": [{"id": sent["id"] + 2}, {"id": sent["id"]}]})
        call("GET", "/api/channels")
        call("POST", "/api/parcels", {"to": "field"})
        call("GET", "/api/parcels/field/1")
        call("POST", "/api/parcels/field/1/seal", {"seal": HEX})
        call("POST", "/api/parcels/import", {
            "site": {"id": "ab" * 8, "name": "lab"}, "to": self.s.store.parcels.site()["id"],
            "parcel": 1, "messages": [], "acks": [], "seal": HEX})
        call("POST", "/mcp", {"jsonrpc": "2.0", "id": 1, "method": "ping"})
        call("POST", "/mcp", {"jsonrpc": "1.0"})
        for method, path, body in (("POST", "/api/messages", {}), ("GET", base + "/messages", None),
                                   ("POST", on + "ack", {}), ("GET", "/v1/pair/x/status", None)):
            self.assertIn("error", call(method, path, body))
        self.missing([" ".join(key) for key in set(self.rows) - visited], "No call here of %s:"
                     " add one, so that an answer is held against what the table says of it.")

    def test_every_operation_has_a_client_method_or_a_tool(self):
        client, Recorder.reached = Recorder(self.s.url), set()
        for owner, others in ((client, names("request perform insist follow close sleep")),
                              (client.messages, {"ask", "resume_command", "follow", "finish",
                                                 "send_many", "ack_many"})):
            for name in set(dir(owner)) - others:
                method = getattr(owner, name)
                if callable(method) and not name.startswith("_"):
                    code, defaults = method.__code__, method.__defaults__ or ()
                    method(*["1"] * (code.co_argcount - 1 - len(defaults)))
        list(client.messages.send_many([{"channel": "c", "content": "x"}]))
        client.messages.ack_many([1])
        self.missing({entry.name for entry in nexus.OPERATIONS if not entry.tool}
                     - Recorder.reached - {"metrics", "openapi", "home_page", "code_page",
                                           "short_code_page", "mcp_endpoint", "code_picture",
                                           "talk_page", "spectator_page", "overview_page"},
                     "The operation %s can be called by nobody who writes Python: add a method to"
                     " nexus.Client (or Messages), or a tool= to its decorator.")

    def test_every_channel_operation_has_a_verb_whose_example_works(self):
        real, home, Recorder.reached = nexus.Client, os.environ.get("HOME", ""), set()
        nexus.Client, os.environ["HOME"] = Recorder, self.folder()
        try:
            for name, verb in nexus.VERBS.items():
                if name.startswith("tx ") and name not in (
                        "tx ask", "tx work", "tx export", "tx import"):     # which wait, or write
                    with contextlib.redirect_stdout(io.StringIO()) as out, \
                            contextlib.redirect_stderr(io.StringIO()):
                        words = nexus.arrange(nexus.shlex.split(verb.example))
                        self.assertFalse(nexus.run(*words), name)
                    self.assertTrue(out.getvalue(), name)
        finally:
            nexus.Client, os.environ["HOME"] = real, home
        self.missing({entry.name for entry in nexus.OPERATIONS if entry.api} - Recorder.reached
                     - {"channel_send_many", "message_ack", "list_channels"}    # what flags do
                     - {"parcel_begin", "parcel_rows", "parcel_seal", "parcel_import"},
                     "The operation %s has no verb: add a row to VERBS, and a function.")
        self.assertIn("tx ask", nexus.VERBS)

    def test_every_session_operation_has_a_verb(self):
        verbs = {"create_session": "create", "get_session": "status", "join_session": "join",
                 "leave_session": "leave", "renew_session": "renew", "send_message": "send",
                 "poll_messages": "poll", "create_code": "pair", "claim_code": "claim",
                 "code_status": "pair-status", "code_page": "skill",
                 "watch_session": "watch-link", "unwatch_session": "watch-link"}
        self.assertLessEqual(set(verbs.values()), set(nexus.VERBS))
        self.missing({entry.name for entry in nexus.OPERATIONS if re.match(
            "/v1/(sessions|pair)", entry.path or "")} - set(verbs),
                     "The operation %s has no verb: add a row to VERBS, and its name above.")


# ----------------------------------------------------------------------------------------
# The command line, called where it stands
#
# A verb is a process to its user. Most are tested without one, twenty times as fast: main() with
# an argv, a home, an environment and three streams of its own; whatever it raises fails the test,
# so each of these tests also says: no traceback. What only a process can show (signals, pipes,
# code pages, kill -9) is shown by processes, further down.
# ----------------------------------------------------------------------------------------

DEAD_URL = "http://127.0.0.1:9"         # the discard port: nobody listens there
GONE, SILENT = "aa" * 24, "bb" * 24     # ids of sessions that no server knows
BASH = shutil.which("bash")
IN_BASH = 'nexus.py() { "$PYTHON" %s "$@"; }\ntx() { nexus.py tx "$@"; }\n' % " ".join(
    nexus.shlex.quote(word) for word in COMMAND[1:])


class Stream(io.TextIOWrapper):
    """A standard stream in memory, of text or bytes; `tty` says whether it is a terminal."""

    def __init__(self, text="", tty=False):
        super().__init__(io.BytesIO(text if isinstance(text, bytes) else text.encode("utf-8")),
                         "utf-8")
        self.isatty = lambda: tty


def run_here(home, *words, input="", url=None, tty=False, **environ):
    """run_nexus() without the process: a Ran. The client's pauses between tries are short."""
    if url:
        environ["NEXUS_URL"] = url
    before, environ = dict(os.environ), clean_environment(home, **environ)
    out, err = Stream(tty=tty), Stream()
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
                (sys, "argv", ["nexus.py"] + [str(word) for word in words]), (sys, "stdout", out),
                (sys, "stderr", err), (sys, "stdin", Stream(input)),
                (nexus, "CLIENT_BACKOFF", 0.001), (nexus.Line, "trace", None)):
            stack.enter_context(patched(owner, name, value))
        stack.callback(os.environ.update, before)
        stack.callback(os.environ.clear)
        os.environ.clear()
        os.environ.update(environ)
        try:
            code = nexus.main()
        except SystemExit as end:       # argparse ends --help this way
            code = end.code or 0
        out.flush(), err.flush()
    out, err = [stream.buffer.getvalue().decode("utf-8") for stream in (out, err)]
    try:
        return Ran(code, out, err, json.loads(out))
    except ValueError:
        return Ran(code, out, err, None)


class Fake:
    """Somebody else's server: answer(request line) gives JSON, bytes, or None for silence."""

    def __init__(self, case, answer):
        self._answer, self.requests = answer, []
        self._sock = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.url = "http://127.0.0.1:%d" % self._sock.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        case.addCleanup(self._stop)

    def _stop(self):
        with contextlib.suppress(OSError), self._sock:
            self._sock.shutdown(socket.SHUT_RDWR)

    def _accept(self):
        with contextlib.suppress(OSError):      # until it is shut down
            while True:
                sock = self._sock.accept()[0]
                threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock):
        with contextlib.suppress(OSError), sock, sock.makefile("rb") as stream:
            lines = [line.decode() for line in iter(stream.readline, b"\r\n")]
            length = re.search(r"(?i)content-length: (\d+)", "".join(lines))
            body = json.loads(stream.read(int(length[1]))) if length else None
            self.requests.append((lines[0].split()[0], body))
            found = self._answer(lines[0])
            if found is None:
                stream.read()                   # says nothing until the client has gone
            elif not isinstance(found, (bytes, str, dict, list)):
                for part in found:              # bit by bit, headers and all
                    sock.sendall(part)
            else:
                raw = found if isinstance(found, bytes) else json.dumps(found).encode()
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(raw) + raw)


class CliCase(ServerCase):
    """A test that runs verbs, from a home of its own, against the server of its class."""

    def setUp(self):
        self.home = self.folder()

    def cli(self, *words, **more):
        """Run a verb here: a Ran."""
        return run_here(more.pop("home", self.home), *words, **dict({"url": self.s.url}, **more))

    def ok(self, *words, **more):
        """The verb succeeds and prints one JSON document, which is returned."""
        ran = self.cli(*words, **more)
        self.assertEqual((ran.code, ran.out.count("\n")), (0, 1), ran)
        return json.loads(ran.out)

    def no(self, error, *words, code=1, **more):
        """The verb is refused: this error as JSON on stdout, its sentence on stderr. A Ran."""
        ran = self.cli(*words, **more)
        self.assertEqual((ran.code, (ran.json or {}).get("error"), ran.out.count("\n")),
                         (code, error, 1), ran)
        self.assertRegex(ran.json["message"], r"\w \w")
        self.assertIn(ran.json["message"], ran.err)
        return ran

    def text(self, *words, **more):
        """The `tx` verb succeeds; what it printed."""
        ran = self.cli("tx", *words, **more)
        self.assertEqual(ran.code, 0, ran)
        return ran.out

    def opened(self, *flags):
        """A session whose creator is ada, in our home: its id."""
        return self.ok("create", "--creator-agent-id", "ada", *flags)["sessionId"]

    def kept(self, session_id, *names):
        """The path of a session's folder, or of a file in it."""
        return os.path.join(self.home, ".config", "messaging", "sessions", session_id, *names)

    def keep(self, session_id, **values):
        """Write state files as somebody else would, just as they are."""
        os.makedirs(self.kept(session_id), exist_ok=True)
        for name, value in values.items():
            with open(self.kept(session_id, name), "w") as file:
                file.write(value)

    def texts(self, *words, **more):
        """What a poll shows."""
        return [row["text"] for row in self.ok("poll", *words, **more)["messages"]]


# ----------------------------------------------------------------------------------------
# Sessions by verb
#
# A conversation can be held with nothing but verbs, from two homes; each answer is the server's
# JSON, alone on stdout, and each refusal an exit code and a JSON error that says what to do.
# ----------------------------------------------------------------------------------------


class SessionVerbs(CliCase):
    """create status join leave pair claim pair-status send poll renew alias unalias."""

    def test_two_homes_hold_a_conversation(self):
        made = self.ok("create", "--ttl", 600, "--max-agents", 3, "--greeting", "Hello!",
                       "--creator-agent-id", "ada")
        self.assertEqual([made[name] for name in ("ttl", "maxAgents", "greeting", "state",
                                                  "creatorAgentId")],
                         [600, 3, "Hello!", "active", "ada"])
        sid, bob = made["sessionId"], self.folder()
        pair = self.ok("pair", sid)
        self.assertEqual(pair["url"], "%s/p/%s" % (self.s.url, pair["code"]))
        self.assertEqual(self.ok("pair-status", pair["code"].lower())["state"], "pending")
        claimed = self.ok("claim", pair["code"], "--agent-id", "bob", home=bob)
        self.assertEqual((claimed["status"], claimed["sessionId"]), ("claimed", sid))
        self.assertEqual(self.ok("pair-status", pair["url"])["state"], "claimed")
        self.no("code_expired_or_used", "claim", pair["code"], "--agent-id", "eve")
        self.assertEqual(self.texts(sid, home=bob), ["Hello!"])
        self.assertEqual(self.ok("send", sid, "Got", "it.", home=bob)["cursor"], "1")
        got = self.ok("poll", sid, "--members")
        self.assertEqual([(row["agentId"], row["text"], row["verified"], row["cursor"])
                          for row in got["messages"]][1:], [("bob", "Got it.", True, "1")])
        self.assertEqual([row["agentId"] for row in got["members"]], ["ada", "bob"])
        self.assertEqual(self.texts(sid), [])
        self.assertEqual(self.ok("renew", sid, "--ttl", 900)["ttl"], 900)
        self.assertEqual(self.ok("status", sid)["agents"], ["ada", "bob"])
        again = self.ok("join", sid, "--agent-id", "bob", home=bob)     # with his key: no harm
        self.assertEqual(again["sessionKey"], claimed["sessionKey"])
        self.no("agent_id_taken", "join", sid, "--agent-id", "bob")
        self.assertEqual(self.ok("alias", sid, "review"),
                         {"ok": True, "alias": "review", "sessionId": sid})
        self.assertEqual(self.ok("unalias", "review"), {"ok": True, "removed": "review"})
        self.ok("send", sid, "in her name", "--agent-id", "ada", home=bob)
        self.assertFalse(self.ok("poll", sid)["messages"][0]["verified"])
        self.assertTrue(self.ok("leave", sid, home=bob)["ok"])
        self.no("forbidden", "leave", sid)                              # the creator stays
        self.assertEqual(self.ok("status", sid)["agents"], ["ada"])

    def test_any_text_arrives_as_it_was_written(self):
        sid = self.opened()
        for words, input, text in (
                (["--odd"], "", "--odd"), (["-x", "--y", "z"], "", "-x --y z"), (["-5"], "", "-5"),
                (["a", "b  c"], "", "a b  c"), (["--", "--json", "-"], "", "--json -"),
                (["na\u00efve \u2603 \U0001f600"], "", "na\u00efve \u2603 \U0001f600"),
                (["-"], "one\ntwo \u2603", "one\ntwo \u2603"), (["-", "b"], "no", "- b"),
                (["a=b", "c"], "", "a=b c"), (["tx", "send"], "", "tx send")):
            self.ok("send", sid, *words, input=input)
            self.assertEqual(self.texts(sid), [text])

    def test_a_message_is_text_or_json_or_both_and_a_key_makes_a_second_run_harmless(self):
        sid = self.opened()
        late = threading.Timer(0.1, self.s.send, (sid, "ada", "late"))
        late.start()
        self.assertEqual(self.texts(sid, "--wait", 20), ["late"])
        self.ok("send", sid, "--json", '{"page": 3}')
        ids = {self.ok("send", sid, "see", '--json=[1, "\u2603"]', "--strict", "this",
                       "--idempotency-key", "k")["id"] for _ in range(3)}
        self.assertEqual(len(ids), 1)
        self.assertEqual([(row["text"], row["json"]) for row in self.ok("poll", sid)["messages"]],
                         [("", {"page": 3}), ("see this", [1, "\u2603"])])
        self.no("idempotency_key_reused", "send", sid, "other", "--idempotency-key", "k")

    def test_an_older_server_gets_json_as_text_and_with_strict_nothing(self):
        old = Fake(self, lambda line: {"status": "healthy", "version": "0.7"}
                   if "/health" in line else {"ok": True, "id": "msg_1", "cursor": "1"})
        words = ["send", GONE, "see", "--json", '{"page":3}', "--agent-id", "ada"]
        self.no("json_unsupported", *(words + ["--strict"]), url=old.url)
        self.assertEqual(old.requests, [("GET", None)])
        self.assertIn("does not take json", self.cli(*words, url=old.url).err)
        self.assertEqual(old.requests[1:], [("GET", None), ("POST", {"text": 'see {"page":3}'})])

    def test_a_refusal_is_the_servers_json_and_exit_1(self):
        sid = self.s.session()[0]
        for error, words in (
                ("session_not_found", "status %s" % GONE), ("session_not_found", "pair " + GONE),
                ("session_not_found", "join %s --agent-id a" % GONE),
                ("session_not_found", "alias %s name" % GONE), ("alias_not_found", "unalias no"),
                ("code_not_found", "pair-status PEARL-FOCAL-00000"),
                ("forbidden", "poll %s --agent-id eve" % sid),
                ("missing_session_key", "leave %s --agent-id ada" % sid)):
            self.no(error, *words.split())
        for words in (["join", sid], ["claim", "PEARL-FOCAL-S5SJV"], ["send", sid, "hi"],
                      ["poll", sid], ["renew", sid], ["leave", sid]):
            self.assertIn("--agent-id", self.no("missing_agent_id", *words).json["message"])


    def test_pollers_start_at_after_once_and_go_on_from_what_they_read(self):
        sid, asked, slept = self.opened(), [], []

        def poll(client, session_id, agent_id, after, *_):
            asked.append(after)
            if len(asked) > 4:
                raise nexus.NexusError("session_not_found")
            batch = [{"text": "x", "cursor": "2"}] if after in (None, "1") else []
            return {"messages": batch, "nextCursor": "2"}
        for start, first in (("0", None), ("1", "1"), ("2", "2")):
            for verb in ("poll-daemon", "heartbeat"):
                del asked[:], slept[:]
                with patched(nexus.Client, "poll", poll), patched(time, "sleep", slept.append):
                    ran = self.cli(verb, sid, "--after", start, *["--yes"] * (verb[0] == "p"))
                self.assertEqual((asked, len(slept)), ([first, "2", "2", "2", "2"],
                                                       3 if start != "2" else 4))
                self.assertEqual(ran.out.count("nextCursor"), start != "2")
        self.assertFalse(os.path.exists(self.kept(sid, "cursor")))      # the saved place stays
        self.assertEqual(len(self.s.lines), 10)
        del self.s.lines[:]


class Refusals(CliCase):
    """What makes no sense is exit 2; a server that is not there is exit 1; both are JSON."""

    def test_wrong_usage_is_exit_2_and_json(self):
        for words in ([], ["nonsense"], ["create", "--nope"], ["status"], ["status", "a", "b"],
                      ["create", "--ttl"], ["create", "--ttl", "soon"], ["alias", "a"],
                      ["poll", "x", "--wait", "1.5"], ["config", "set-url"], ["config", "paint"],
                      ["help", "nonsense"], ["serve", "now"], ["send", "x", "--agent-id", "a"],
                      ["send", "x", "--agent-id", "a", "--json", "{"], ["ls", "--json", "x"]):
            with self.subTest(words):
                self.no("usage", *words, code=2)
        self.keep(GONE, agent="a")
        self.no("usage", "ls", NEXUS_STATUS_TIMEOUT="soon", code=2)
        self.no("usage", "status", "x", NEXUS_HTTP_TIMEOUT="soon", code=2)

    def test_what_only_the_server_knows_to_be_wrong_is_wrong_usage_in_the_verbs_words(self):
        sid, found = self.s.session()[0], []
        for words, told in (("create --ttl 0 --max-agents 99999", "--ttl must be at least 1;"
                             " --max-agents must be at most 50."),
                            ("poll %s --agent-id ada --after x" % sid, "--after must"),
                            ("renew %s --agent-id ada --ttl 2d" % sid, "--ttl must be at most 864"),
                            ("tx send %s x" % ("c" * 257), "CHANNEL must have at most"),
                            ("tx send c x --ttl 0", "--ttl must be at least 1"),
                            ("tx send c x --metadata []", "--metadata must be an object"),
                            ("tx lease c --consumer w --lease 2h", "--lease must be at most 3600"),
                            ("tx inbox c --wait 2m", "--wait must be at most 60"),
                            ("tx extend 1 --lease 5 --lease-token " + "t" * 129,
                             "--lease-token must have at most 128")):
            ran = self.no("invalid_request", *words.split(), "--json", code=2) \
                if words[:2] == "tx" else self.no("invalid_request", *words.split(), code=2)
            self.assertIn(told, ran.json["message"])
            self.assertIn("See: nexus.py help " + ("tx" if words[:2] == "tx" else
                                                   words.split()[0]), ran.err)
            found += [row["field"] for row in ran.json["details"]]
        self.assertEqual(found[:3], ["--ttl", "--max-agents", "--after"])
        self.assertEqual(self.cli("tx", "send", "c", "x", "--ttl", 0).out, "")

    def test_a_wrong_word_is_told_with_the_nearest_verb_and_its_help(self):
        for words, meant in ((["inbx"], "tx inbox"), (["tx", "inbx", "c"], "tx inbox"),
                             (["sned", "x"], "send"), (["INBOX", "c"], "tx inbox"),
                             (["tx", "pending", "c"], "tx outbox pending"), (["lst"], "ls"),
                             (["poll-statu"], "poll-status"), (["frobnicate"], None),
                             (["tx", "frobnicate"], None), ([], None)):
            ran = self.cli(*words, "--json")
            self.assertEqual((ran.code, ran.json["error"]), (2, "usage"), ran)
            self.assertEqual(re.findall(r"did you mean (.*?)\?", ran.json["message"]),
                             [meant] if meant else [])
            self.assertRegex(ran.err, r"See: nexus\.py help%s\n$" % (
                " " + meant if meant else " tx" if words[:1] == ["tx"] else ""))

    def test_wrong_usage_of_tx_keeps_stdout_for_results(self):
        for words, told in (([], "tx"), (["nonsense"], "tx nonsense"), (["send", "b"], "CONTENT"),
                            (["ack", "x"], "ID"), (["lease", "jobs"], "--consumer"),
                            (["ask", "jobs"], "question"), (["inbox", "c", "--limit", "few"],
                                                            "--limit"), (["outbox"], "outbox"),
                            (["send", "c", "x", "--metadata", "{"], "JSON"), (["ack"], "ID"),
                            (["release", "1"], "--lease-token"), (["release"], "ID"),
                            (["extend", "1", "--lease-token", "x"], "--lease"),
                            (["extend", "1", "--lease", "5"], "--lease-token")):
            ran = self.cli("tx", *words)
            self.assertEqual((ran.code, ran.out), (2, ""), ran)
            self.assertIn(told, ran.err)
            self.assertIn("nexus.py help tx", ran.err)
            self.no("usage", "tx", *words, "--json", code=2)
        self.assertEqual(self.cli("send", "tx").json["error"], "usage")     # its text is no verb

    def test_no_sentence_speaks_of_what_its_reader_never_sees(self):
        unseen = r"\bheader\b|\bX-[A-Z]|Retry-After|Agent-Id|-Key\b|Authorization|Host\b"
        http = {"bad_request", "method_not_allowed", "headers_too_large"}   # told by HTTP alone
        for code in set(nexus.ERRORS) - http:
            for spell in (nexus.argument_name, str.lower):
                refusal = nexus.without_headers(nexus.NexusError(code), spell)
                self.assertNotRegex(refusal.message, unseen)
        sid = self.s.session()[0]
        for words, told in ((["join", sid], "--agent-id"), (["claim", "x"], "--agent-id"),
                            (["poll", sid, "--agent-id", "a b"], "--agent-id must match"),
                            (["send", sid, "x", "--agent-id", "ada", "--idempotency-key",
                              "k" * 129], "--idempotency-key must have")):
            ran = self.cli(*words)
            self.assertEqual(ran.code, 2 if "must" in told else 1, ran)
            self.assertIn(told, ran.json["message"])
            self.assertNotRegex(ran.out + ran.err, unseen)
        self.assertEqual(ran.json["details"][0]["field"], "--idempotency-key")
        locked = self.server(token="t")
        self.assertIn("NEXUS_TOKEN", self.no("unauthorized", "create", url=locked.url).err)
        late = Scripted(self, http_answer(429, {"error": "rate_limit_exceeded", "message": (
            "Wait as Retry-After says.")}, "Retry-After: 12")).url
        with patched(nexus, "CLIENT_ATTEMPTS", 1):
            self.assertIn("Wait 12 s.", self.no("rate_limit_exceeded", "create", url=late).err)

    def test_a_server_that_is_not_there_is_named_with_the_way_to_start_one(self):
        self.keep(GONE, agent="ada\n", key="k\n")
        for words in (["create"], ["status", "x"], ["poll", GONE], ["send", GONE, "x"],
                      ["pair-status", "x"], ["bind", "x"], ["skill", "PEARL-FOCAL-S5SJV"],
                      ["tx", "inbox", "c", "--json"]):
            ran = self.no("unreachable", *words, url=DEAD_URL)
            self.assertIn(DEAD_URL, ran.json["message"])
            self.assertIn("python3 nexus.py serve", ran.err)
        ran = self.cli("tx", "inbox", "c", url=DEAD_URL)
        self.assertEqual((ran.code, ran.out), (1, ""))
        self.assertIn("python3 nexus.py serve", ran.err)
        for url in ("ftp://x", "http://", "http://a b", "127.0.0.1:x", "http://127.0.0.1:65536"):
            self.assertIn("http://127.0.0.1:3456",
                          self.no("invalid_url", "create", "--url", url).json["message"])

    def test_somebody_elses_server_is_no_traceback(self):
        self.keep(GONE, agent="ada\n", key="k\n")
        for answer in ({}, [], "text", b"<html>"):
            other = Fake(self, lambda line, answer=answer: answer)
            for words in (["create"], ["poll", GONE], ["tx", "inbox", "c", "--json"],
                          ["claim", "x", "--agent-id", "a"], ["doctor"]):
                with self.subTest(answer=answer, words=words):
                    ran = self.cli(*words, "--url", other.url)
                    self.assertEqual((ran.code, ran.json is None), (1, False), ran)

    def test_keys_and_tokens_are_no_arguments_of_a_client_and_stay_off_the_open_network(self):
        for name in set(nexus.VERBS) - {"serve"}:
            named = {flag for flag in nexus.flags_of(name) if re.search("key|token|secret", flag)}
            self.assertLessEqual(named, {"--lease-token", "--idempotency-key",
                                         "--key-file"}, name)
        self.keep(GONE, agent="ada\n", key="k\n")
        for value in ("", "0", "false", "no"):
            self.no("insecure_transport", "send", GONE, "x", url="http://192.0.2.1:9",
                    NEXUS_INSECURE=value, NEXUS_HTTP_TIMEOUT="0.05")


# ----------------------------------------------------------------------------------------
# Flags and help
#
# A flag may stand before the verb, behind it or in its middle; --help always ends with a line
# that works. Both are checked for every verb and every flag of the table, not for samples.
# ----------------------------------------------------------------------------------------


def parsed_words(words):
    """(verb, the values of its flags and arguments) of a command line."""
    name, flags, rest = nexus.arrange(words)
    return name, vars(nexus.make_parser(name).parse_args(flags + ["--"] * bool(rest) + rest))


class FlagsAndHelp(CliCase):
    """The table of verbs, whole."""

    def test_every_flag_of_every_verb_may_stand_anywhere(self):
        for name, verb in nexus.VERBS.items():
            arguments = ["7" if re.search("ID|NUMBER", word) else "x"
                         for word in verb.arguments.split()]
            words = name.split()
            for flag, row in nexus.flags_of(name).items():
                given, wanted = ([flag], True) if row.kind is bool else \
                    ([flag], "1") if row.kind is None else ([flag, "5"], row.kind("5"))
                given = given + ["%s=5" % other for other, more in nexus.flags_of(name).items()
                                 if more.needed and other != flag]
                for line in (words + arguments + given, words + given + arguments,
                             given + words + arguments, words[:1] + given + words[1:] + arguments):
                    with self.subTest(line):
                        found, values = parsed_words(line)
                        self.assertEqual((found, values[flag[2:].replace("-", "_")]),
                                         (name, wanted))
        self.assertEqual(parsed_words(["create", "--greeting=--hi"])[1]["greeting"], "--hi")
        self.assertEqual(parsed_words(["create", "--greeting", "-hi"])[1]["greeting"], "-hi")
        self.assertEqual(parsed_words(["tx", "inbox", "c", "--sender", ""])[1]["sender"], "")
        self.assertEqual(parsed_words(["status", "--", "--url"])[1]["session"], "--url")

    def test_every_help_ends_with_an_example_that_parses(self):
        self.missing([name for name, verb in nexus.VERBS.items() if not verb.run.__doc__],
                     "Nobody knows what the verb %s does: its function needs a docstring.")
        for name in nexus.VERBS:
            with self.subTest(name):
                ran = self.cli(*(name.split() + ["--help"]))
                self.assertEqual((ran.code, ran.err), (0, ""))
                example = nexus.shlex.split(ran.out.splitlines()[-1])
                self.assertEqual((example[0], parsed_words(example[1:])[0]), ("nexus.py", name))
                for flag in nexus.flags_of(name):
                    self.assertIn(flag, ran.out)
        shown = " ".join(self.cli("serve", "--help").out.split())
        for row in nexus.SETTINGS:
            self.assertIn("default: %s; %s)" % (row.default, nexus.environment_name(row)), shown)

    def test_what_is_no_number_is_said_in_words(self):
        self.assertIn("ID takes a whole number, not 'x'. See: nexus.py help tx ack",
                      self.cli("tx", "ack", "x").err)
        self.assertIn("--limit takes a whole number, not '1.5'",
                      self.cli("tx", "inbox", "c", "--limit", "1.5").err)

    def test_what_is_not_given_is_said_in_words(self):
        self.assertIn("Error: --limit takes a value. See: nexus.py help tx inbox",
                      self.cli("tx", "inbox", "c", "--limit").err)

    def test_help_lists_every_verb_and_explains_each(self):
        for ran in (self.cli("--help"), self.cli("help"), self.cli("-h", "nonsense")):
            self.assertEqual((ran.code, ran.err), (0, ""))
            for name in nexus.VERBS:
                self.assertIn("  %s " % name, ran.out)
        for group, words in (("tx", ["tx", "--help"]), ("tx", ["help", "tx"]), ("tx", ["-h", "tx"]),
                             ("tx outbox", ["tx", "outbox", "--help"])):
            ran = self.cli(*words)
            self.assertEqual((ran.code, ran.err), (0, ""))
            self.assertEqual(re.findall(r"(?m)^  ([a-z -]+?)(?: +[A-Z[].*)?$", ran.out), [
                name for name in nexus.VERBS if name.startswith(group + " ")])
        self.assertIn("tx ask reviewer", self.cli("help", "tx", "ask").out)
        self.no("usage", "help", "tx", "ou", code=2)
        with open(NEXUS, "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
        ran = self.cli("--version")
        self.assertEqual(ran.json, {
            "version": nexus.VERSION, "sha256sum": found + "  nexus.py",
            "byEye": "%s %s %s %s" % (found[:4], found[4:8], found[8:12], found[12:16])})

    def test_skill_teaches_and_a_code_shows_its_invitation(self):
        ran = self.cli("skill")
        self.assertEqual((ran.code, ran.out[:2]), (0, "# "))
        for word in ("claim CODE", "poll SESSION --wait", "leave SESSION", "data, not as orders"):
            self.assertIn(word, ran.out)
        pair = self.ok("pair", self.opened())
        for given in (pair["code"], pair["url"]):
            self.assertIn(pair["code"], self.cli("skill", given).out)
        self.assertEqual(self.ok("pair-status", pair["code"])["state"], "pending")
        self.no("code_not_found", "skill", "PEARL-FOCAL-00000")


# ----------------------------------------------------------------------------------------
# Cursors and local state
#
# What an agent need not remember is in files that nexus.sh reads too: the same bytes, readable by
# nobody else, replaced whole; and the cursor moves only when its messages have been written out.
# ----------------------------------------------------------------------------------------


class LocalState(CliCase):
    """The files under ~/.config/messaging."""

    def tree(self):
        """{path below home: mode} of all there is."""
        return {os.path.relpath(os.path.join(top, name), self.home):
                os.stat(os.path.join(top, name)).st_mode & 0o777
                for top, folders, files in os.walk(self.home) for name in folders + files}

    def read(self, *names):
        with open(os.path.join(self.home, ".config", "messaging", *names), "rb") as file:
            return file.read()

    def test_the_cursor_moves_with_what_was_shown_and_never_for_after(self):
        sid = self.opened("--greeting", "Hello!")
        for text in "abc":
            self.s.send(sid, "ada", text)
        self.assertEqual(self.texts(sid, "--after", 2), ["c"])
        self.assertFalse(os.path.exists(self.kept(sid, "cursor")))
        self.assertEqual(self.texts(sid), ["Hello!", "a", "b", "c"])
        self.assertEqual(self.texts(sid, "--after", 0), ["Hello!", "a", "b", "c"])
        self.assertEqual(self.texts(sid, "--after", 1), ["b", "c"])
        self.assertEqual(self.read("sessions", sid, "cursor"), b"3\n")
        self.assertEqual(self.texts(sid), [])

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs POSIX pipes and /dev/full")
    def test_output_that_nobody_takes_loses_nothing(self):
        sid = self.opened("--greeting", "Hello!")
        self.s.send(sid, "ada", "a")
        for words in (["poll", sid], ["poll-all"]):
            reader, broken = os.pipe()
            os.close(reader)
            for out in (broken, os.open("/dev/full", os.O_WRONLY)):
                with self.subTest(words=words, full=out != broken):
                    done = subprocess.run(
                        COMMAND + words, env=clean_environment(self.home),
                        stdout=out, stderr=subprocess.PIPE, timeout=60)
                    os.close(out)
                    self.assertEqual(done.returncode, 1)
                    self.assertNotRegex(done.stderr, b"Traceback|Exception ignored")
                    self.assertFalse(os.path.exists(self.kept(sid, "cursor")))
        self.assertEqual(self.texts(sid), ["Hello!", "a"])

    @unittest.skipUnless(os.name == "posix", "Windows keeps no such modes")
    def test_bytes_and_modes_are_those_of_nexus_sh_under_any_umask(self):
        self.addCleanup(os.umask, os.umask(0))
        made = self.ok("create", "--creator-agent-id", "ada")
        sid = made["sessionId"]
        self.ok("poll", sid)
        self.ok("alias", sid, "review")
        self.ok("config", "set-url", self.s.url + "/")
        for name, value in (("agent", "ada"), ("key", made["sessionKey"]), ("cursor", "0"),
                            ("server", self.s.url)):
            self.assertEqual(self.read("sessions", sid, name), value.encode() + b"\n")
        self.assertEqual(json.loads(self.read("aliases.json")), {"review": sid})
        self.assertEqual(json.loads(self.read("config.json"))["serverUrl"], self.s.url)
        self.assertEqual(len(self.tree()), 11)          # with the lock; no draft was left behind
        for path, mode in self.tree().items():
            folder = os.path.isdir(os.path.join(self.home, path))
            self.assertEqual(oct(mode), oct(0o700 if folder else 0o600), path)

    def test_a_file_is_replaced_whole_or_not_at_all(self):
        state, seen, really = nexus.State(self.home), [], os.replace
        state.put("s", "cursor", "1")

        def replace(draft, path):
            with open(draft) as new, open(path) as old:
                seen.append((new.read(), old.read(), os.path.dirname(draft)))
            really(draft, path)
        with patched(os, "replace", replace):
            state.put("s", "cursor", "2")
        self.assertEqual((seen, state.get("s", "cursor")), ([("2\n", "1\n", self.kept("s"))], "2"))

    def test_two_writers_of_one_file_never_take_each_others_draft(self):
        state = nexus.State(self.home)
        with between(os, "replace", lambda: state.put("s", "cursor", "1"), before=True):
            state.put("s", "cursor", "2")       # between its draft and its replace, another's whole
        self.assertEqual(state.get("s", "cursor"), "2")
        with patched(os, "replace", lambda *_: self.fail("not reached") if _ is None else 1 / 0):
            self.assertRaises(ZeroDivisionError, state.put, "s", "cursor", "3")

        def full(*_):
            raise OSError(28, "No space left on device")
        with patched(os, "replace", full):
            with self.assertRaisesRegex(nexus.NexusError, "No space left"):
                state.put("s", "agent", "ada")
        self.assertNotIn("agent", os.listdir(self.kept("s")))
        self.assertEqual(len([name for name in os.listdir(self.kept("s")) if ".tmp" in name]), 1)

    def test_eight_who_name_sessions_at_once_keep_eight_names(self):
        meet = threading.Barrier(8)

        def give(name):
            meet.wait(10)
            nexus.State(self.home).set_alias(name, "s")
        running = [Started(give, "name-%d" % number) for number in range(8)]
        for started in running:
            started.result()
        state = nexus.State(self.home)
        self.assertEqual(len(state.aliases()), 8)
        with between(nexus.State, "_load_json", lambda: writing.append(
                Started(nexus.State(self.home).set_alias, "late", "s"))):
            writing = []
            state.set_alias("early", "s")       # who comes between reading and writing waits
        writing[0].result()
        self.assertLessEqual({"early", "late"}, set(state.aliases()))
        state.forget("s")
        self.assertEqual(state.aliases(), {})
        state.configure("http://a")
        self.assertEqual(state.configured_url(), "http://a")

    def test_a_lock_that_is_never_given_back_stops_nobody(self):
        state = nexus.State(self.home)
        state.set_alias("a", "s")
        held = os.open(os.path.join(state.root, "lock"), os.O_RDWR)
        self.addCleanup(os.close, held)
        nexus.lock_file(held)
        with patched(nexus, "LOCK_SECONDS", 0.05):
            state.set_alias("b", "s")
        self.assertEqual(set(state.aliases()), {"a", "b"})

    @unittest.skipUnless(os.name == "posix", "needs symbolic links")
    def test_a_link_in_the_place_of_a_file_of_ours_is_never_followed(self):
        target, state = os.path.join(self.home, "target"), nexus.State(self.home)
        with open(target, "w") as file:
            file.write("precious")
        state.put("s", "key", "k")
        for name in (self.kept("s", "cursor"), os.path.join(state.root, "aliases.json")):
            os.symlink(target, name)
        state.put("s", "cursor", "7")           # it takes the link's place
        self.assertFalse(os.path.islink(self.kept("s", "cursor")))
        os.symlink(target, os.path.join(state.root, "lock"))
        self.assertIn("symbolic link", self.no("broken_state", "config", "set-url", "http://a").out)
        with patched(os, "urandom", lambda count: b"a" * count):
            os.symlink(target, self.kept("s", "agent." + "61" * 8 + ".tmp"))
            with self.assertRaises(nexus.NexusError):
                state.put("s", "agent", "ada")
        with open(target) as file:
            self.assertEqual(file.read(), "precious")

    def test_a_session_gets_its_name_at_its_birth_also_without_a_creator(self):
        server, home = self.server(), self.folder()
        made = run_nexus(home, "create", "--alias", "x", url=server.url).json
        joined = run_nexus(home, "join", "x", "--agent-id", "bob").json
        self.assertEqual(joined["sessionId"], made["sessionId"])

    def test_an_alias_stands_wherever_a_session_id_does_and_leave_removes_it(self):
        sid = self.s.session()[0]
        more = {"alias": ["again"], "send": ["hi"], "join": ["--agent-id", "bob"]}
        self.ok("join", sid, "--agent-id", "bob")
        self.ok("alias", sid, "review")
        for name, verb in nexus.VERBS.items():
            if verb.arguments.startswith("SESSION") and name not in ("leave", "heartbeat",
                                                                     "poll-daemon", "chat",
                                                                     "transcript"):
                self.ok(name, "review", *more.get(name, []))
        self.assertEqual(self.ok("status", "again")["sessionId"], sid)
        self.assertTrue(self.ok("leave", "review")["ok"])
        self.assertFalse(os.path.exists(self.kept(sid)))
        self.assertEqual(nexus.State(self.home).aliases(), {})

    def test_leave_forgets_what_the_server_has_forgotten(self):
        sid, _ = self.s.session(("ada", "bob"))
        for session, agent in ((GONE, "ada"), (sid, "ghost")):
            self.keep(session, agent=agent + "\n", key="c0" * 32 + "\n")
            self.ok("alias", session, "gone")
            self.ok("leave", "gone")
            self.assertFalse(os.path.exists(self.kept(session)))
            self.assertEqual(nexus.State(self.home).aliases(), {})
        self.keep(sid, agent="bob\n", key="c0" * 32 + "\n")     # in it, but this is not his key
        self.no("invalid_session_key", "leave", sid)
        self.assertTrue(os.path.exists(self.kept(sid, "key")))

    def test_state_written_by_others_is_read(self):
        sid, keys = self.s.session()
        self.keep(sid, agent="ada", key=keys["ada"])            # without a newline, and no server
        with open(os.path.join(self.home, ".config", "messaging", "aliases.json"), "w") as file:
            json.dump({"review": sid, "z": "gone"}, file, indent=2)
        self.ok("send", "review", "hi")
        self.assertTrue(self.ok("poll", "review", url=DEAD_URL)["messages"][0]["verified"])
        self.keep("notes.bak"), self.keep("old copy")           # what people leave lying about
        for verb in ("ls", "poll-all", "poll-status", "doctor"):
            self.assertIn(sid, self.cli(verb).out)

    def test_a_session_name_cannot_lead_out_of_its_folder(self):
        self.opened()
        before, more = self.tree(), {"send": ["hi", "--agent-id", "a"], "alias": ["y"]}
        more.update(dict.fromkeys(("join", "poll", "leave", "renew"), ["--agent-id", "a"]))
        for name in ("../../x", "..", ".", "a/b", "/etc", "a\\b", "a\0b", "x" * 200):
            for verb, row in nexus.VERBS.items():
                if row.arguments.startswith("SESSION") and verb not in ("poll-daemon", "heartbeat"):
                    self.no("session_not_found", verb, name, *more.get(verb, []))
        self.assertEqual(self.tree(), before)

    def test_broken_unwritable_or_missing_state_is_a_sentence(self):
        root = os.path.join(self.home, ".config", "messaging")
        os.makedirs(root)
        for name in ("aliases.json", "config.json"):
            for text in (b"{", b"[]", b"\xff"):
                with open(os.path.join(root, name), "wb") as file:
                    file.write(text)
                self.assertIn(name, self.no("broken_state", "status", "x", url="").out)
                os.remove(os.path.join(root, name))
        os.rmdir(root)
        with open(root, "w"):
            pass                        # a file stands where the folder should be
        ran = self.cli("config", "set-url", self.s.url)
        self.assertEqual(ran.code, 1, ran)
        self.assertIn(root, ran.json["message"])
        with patched(os.path, "expanduser", lambda path: path):
            self.assertIn("HOME", self.no("no_home", "create").json["message"])


# ----------------------------------------------------------------------------------------
# Which server, and how are they all?
#
# --url, then the session's own server, then NEXUS_URL, then the saved one, then the default. ls
# and doctor ask all servers at once and tell an unknown session from a silent server.
# ----------------------------------------------------------------------------------------


class Servers(CliCase):
    """config bind claim ls poll-all poll-status doctor."""

    def test_the_order_is_flag_session_environment_config_default(self):
        def shown(*words, url=None):
            found = self.ok("config", "show", *words, url=url)
            return found["serverUrl"], found["source"]
        self.assertEqual(shown(), ("http://127.0.0.1:3456", "default"))
        self.assertEqual(self.ok("config", "set-url", "HTTP://Config.Example:81/x/")["serverUrl"],
                         "http://config.example:81/x")
        self.assertEqual(shown(), ("http://config.example:81/x", "config"))
        self.assertEqual(shown(url=DEAD_URL), (DEAD_URL, "env NEXUS_URL"))
        self.assertEqual(shown("--url", "http://flag", url=DEAD_URL), ("http://flag", "--url"))
        self.ok("config", "unset")
        self.assertEqual(shown()[1], "default")
        self.no("invalid_url", "config", "set-url", "nonsense")
        sid = self.opened()
        self.assertTrue(self.ok("send", sid, "follows its server", url=DEAD_URL)["ok"])
        self.no("unreachable", "send", sid, "x", "--url", DEAD_URL)

    def test_bind_and_a_pasted_link_choose_the_server(self):
        sid, _ = self.s.session()
        self.no("session_not_found", "bind", GONE)
        self.assertEqual(self.ok("bind", sid, "--url", self.s.url, url=DEAD_URL),
                         {"ok": True, "sessionId": sid, "server": self.s.url})
        link = "%s/p/%s" % (self.s.url, self.ok("pair", sid, url=DEAD_URL)["code"].lower())
        self.assertEqual(self.ok("claim", link, "--agent-id", "bob", url=DEAD_URL,
                                 home=self.folder())["status"], "claimed")

    def test_ls_tells_active_gone_silent_and_broken_apart(self):
        broken, sid = Fake(self, lambda line: b"<html>"), self.opened()
        self.ok("alias", sid, "review")
        self.keep(GONE, agent="x\n", server=self.s.url + "\n")
        self.keep(SILENT, agent="y\n", server=DEAD_URL + "\n", cursor="7\n")
        self.keep("cc" * 24, agent="z\n", server=broken.url + "\n")
        rows = {row["sessionId"]: row for row in self.ok("ls", "--json", url="")["sessions"]}
        self.assertEqual({sid: row["status"] for sid, row in rows.items()}, {
            sid: "active", GONE: "not_found", SILENT: "unreachable", "cc" * 24: "error"})
        self.assertEqual(rows[sid], {"sessionId": sid, "alias": "review", "agentId": "ada",
                                     "status": "active", "server": self.s.url, "cursor": None})
        self.assertEqual((rows[SILENT]["cursor"], rows[SILENT]["alias"]), ("7", None))
        self.assertEqual({row["status"] for row in self.ok("ls", "--active")["sessions"]},
                         {"active", "unreachable"})
        ran = self.cli("ls", tty=True)
        self.assertEqual(len(ran.json["sessions"]), 4)
        self.assertRegex(ran.err, r"ALIAS +SESSION +AGENT +STATUS\n(?s:.*)review +%s" % sid[:12])
        self.assertNotIn("ALIAS", self.cli("ls", "--json", tty=True).err + self.cli("ls").err)

    def test_ls_asks_all_servers_side_by_side(self):
        meet = threading.Barrier(5)             # nobody answers before all five have been asked

        def together(line):
            meet.wait(10)
            return {"sessionId": "x", "agents": []}
        for number in range(5):
            self.keep("%048d" % number, server=Fake(self, together).url)
        self.assertEqual([row["status"] for row in self.ok("ls")["sessions"]], ["active"] * 5)
        for number in range(5):
            self.keep("%048d" % number, server=Fake(self, lambda line: None).url)
        began = time.monotonic()
        rows = self.ok("ls", NEXUS_STATUS_TIMEOUT="1")["sessions"]
        self.assertEqual([row["status"] for row in rows], ["unreachable"] * 5)
        self.assertLess(time.monotonic() - began, 5 * 1)
        self.no("unreachable", "status", "%048d" % 0, NEXUS_HTTP_TIMEOUT="0.05")

    def test_poll_all_polls_each_session_and_keeps_its_cursor(self):
        sids = sorted([self.opened(), self.opened()])
        self.keep(GONE, agent="x\n", server=self.s.url)
        self.keep(SILENT, agent="y\n", server=DEAD_URL)
        for sid in sids:
            self.s.send(sid, "ada", sid[:8])
        rows = {row["sessionId"]: row for row in self.ok("poll-all", "--members")["sessions"]}
        self.assertEqual(sorted(rows), sorted(sids + [SILENT]))
        for sid in sids:
            self.assertEqual([row["text"] for row in rows[sid]["messages"]], [sid[:8]])
            self.assertEqual(rows[sid]["members"][0]["agentId"], "ada")
        self.assertEqual(rows[SILENT]["error"], "unreachable")
        again = self.ok("poll-all", "--active")["sessions"]
        self.assertEqual([row["messages"] for row in again], [[]] * 3)
        last = self.ok("poll-status")
        self.assertEqual((last["polling"], sorted(last["lastPoll"])), ([], sids))
        self.assertRegex(last["lastPoll"][sids[0]], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")

    def test_doctor_is_content_only_when_all_is_well(self):
        sid = self.opened()
        ran = self.cli("doctor")
        self.assertEqual((ran.code, ran.json["ok"], ran.json["divergence"]), (0, True, False), ran)
        self.assertEqual(ran.json["sessions"], [{
            "sessionId": sid, "bound": self.s.url, "probed": self.s.url, "httpCode": 200,
            "memberOfSession": True, "keyFile": "ok"}])
        self.assertRegex(ran.err, r"Sessions: \d+ with (?s:.*)All is well")
        os.chmod(self.kept(sid, "key"), 0o644)
        if os.name == "posix":
            ran = self.cli("doctor")
            self.assertEqual((ran.code, ran.json["sessions"][0]["keyFile"]), (1, "insecure"))
            self.assertIn("chmod 600", ran.err)
        for folder, agent, server, code, member in (
                (sid, "nobody", self.s.url, 200, False), (GONE, "x", self.s.url, 404, None),
                (SILENT, "y", DEAD_URL, 0, None)):
            self.home = self.folder()
            self.keep(folder, agent=agent, server=server)
            ran = self.cli("doctor")
            row, = ran.json["sessions"]
            self.assertEqual((ran.code, ran.json["ok"], row["httpCode"], row["memberOfSession"],
                              row["keyFile"]), (1, False, code, member, "absent"))
            self.assertEqual(ran.json["divergence"], server == DEAD_URL)
        self.assertEqual({row["server"]: row["reachable"] for row in ran.json["health"]},
                         {self.s.url: True, DEAD_URL: False})
        self.assertIn(DEAD_URL + ": No answer", ran.err)
        self.assertEqual(self.cli("doctor", home=self.folder(), url=DEAD_URL).code, 1)


    def test_doctor_tells_why_a_server_is_ill_and_its_figures_are_words(self):
        ill = {"status": "degraded", "reason": "the disk is full\x1b[1m", "version": "9"}
        expiry = {"at": "2026-11-24T16:00:00.000Z", "deleted": 5, "milliseconds": 7}
        figures = dict.fromkeys(nexus.re.findall(r"(\w+):", nexus.SHAPES["Stats"]), 1)
        sick = Scripted(self, http_answer(503, ill), http_answer(200, dict(figures,
                                                                           lastExpiry=expiry)))
        ran = self.cli("doctor", url=sick.url)
        self.assertEqual((ran.code, ran.json["ok"], ran.json["health"]), (1, False, [
            {"server": sick.url, "reachable": True, "version": "9", "uptime": None,
             "reason": "the disk is full\x1b[1m"}]))
        self.assertIn(sick.url + ": the disk is full\\x1b[1m\n", ran.err)
        self.assertIn("Last expiry: 5 rows in 7 ms, at 2026-11-24T16:00:00.000Z.\n", ran.err)
        self.assertIn("problems", ran.err)
        self.assertIn("Last expiry: 0 rows in 0 ms, never.",
                      self.cli("doctor", url=self.server().url).err)
        for odd in ({}, dict(figures, lastExpiry=5), dict(figures, lastExpiry={})):
            well = Scripted(self, http_answer(200, {"version": "0.7"}), http_answer(200, odd))
            self.assertEqual(self.cli("doctor", url=well.url).code, 0)      # an older server

    def test_an_address_in_a_file_that_is_none_spoils_one_row_only(self):
        sid = self.opened()
        self.keep(GONE, agent="x", server="nonsense")
        rows = {row["sessionId"]: row["status"] for row in self.ok("ls")["sessions"]}
        self.assertEqual(rows, {sid: "active", GONE: "error"})
        ran = self.cli("doctor")
        self.assertEqual((ran.code, {row["sessionId"]: row["httpCode"] for row in
                                     ran.json["sessions"]}), (1, {sid: 200, GONE: 400}))
        self.no("invalid_url", "poll", GONE)
        self.keep(GONE, server=Scripted(self, BROKEN).url)      # which can be asked once only
        self.assertIn('"error"', self.cli("ls").out)


# ----------------------------------------------------------------------------------------
# Channels by verb
#
# `tx` prints what its seed shows, to the letter; with --json the JSON of the seed. The seed's own
# scripts run unchanged, with `tx` as a shell function.
# ----------------------------------------------------------------------------------------

FAN_OUT = '''
CURSOR_1=0
MESSAGES=$(tx inbox shared-work --after $CURSOR_1 --json)
CURSOR_1=$(echo "$MESSAGES" | jq -r '.[-1].id // 0')

# Agent 2 reads the same messages independently
CURSOR_2=0
MESSAGES=$(tx inbox shared-work --after $CURSOR_2 --json)
CURSOR_2=$(echo "$MESSAGES" | jq -r '.[-1].id // 0')
[ $CURSOR_1 -gt 0 ] && [ $CURSOR_1 = $CURSOR_2 ] && echo same
'''
REQUEST_REPLY = '''
tx send reviewer "Please review PR #42" --correlation review-42
tx inbox reviewer --json | jq -r '.[] | select(.correlationId == "review-42")'
tx send requester "LGTM, approved" --correlation review-42
tx inbox requester --correlation review-42 --json
'''
TASK_CHANNEL = '''
tx send "task:tx-abc123" "Started implementation" --task tx-abc123
tx send "task:tx-abc123" "Tests passing, ready for review" --task tx-abc123
tx inbox "task:tx-abc123"
'''
WORKER = '''
AGENT_ID="worker-7"
CURSOR=0
for ROUND in 1 2; do                    # the seed's `while true`, and without its sleep
  MESSAGES=$(tx inbox "$AGENT_ID" --after $CURSOR --json)
  COUNT=$(echo "$MESSAGES" | jq length)
  if [ "$COUNT" -gt 0 ]; then
    CURSOR=$(echo "$MESSAGES" | jq -r '.[-1].id')
    echo "$MESSAGES" | jq -c '.[]' | while read -r msg; do
      CONTENT=$(echo "$msg" | jq -r '.content')
      MSG_ID=$(echo "$msg" | jq -r '.id')
      echo "Processing: $CONTENT"
      tx ack "$MSG_ID"
    done
  fi
done
'''


class ChannelVerbs(CliCase):
    """tx send, inbox, ack, ack all, outbox pending, outbox gc."""

    def test_text_is_the_seeds_to_the_letter(self):
        first = self.text("send", "letter", "Task tx-abc123 is ready for review",
                          "--sender", "orchestrator")
        number = int(first.split()[1])
        self.assertEqual(first, 'Message %d sent to channel "letter"\n  Sender: orchestrator\n'
                         % number)
        second = self.text("send", "letter", "Build", "passed", "--ttl", "3600", "--task", "tx-1",
                           "--correlation", "req-001", "--metadata", '{"version":"2.3.1"}')
        self.assertRegex(second, r'^Message %d sent to channel "letter"\n  Sender: cli\n  '
                         r'Correlation: req-001\n  Task: tx-1\n  Expires: \d{4}-\d\d-\d\dT'
                         r'\d\d:\d\d:\d\d\.\d{3}Z\n$' % (number + 1))
        when = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        self.assertRegex(self.text("inbox", "letter"), (
            r"^\[%d\] %s orchestrator: Task tx-abc123 is ready for review\n"
            r"\[%d\] %s cli: Build passed\n\n2 message\(s\)\n$") % (number, when, number + 1, when))
        for words, said in (("outbox pending letter", '2 pending message(s) on channel "letter"'),
                            ("ack %d" % number, "Message %d acknowledged" % number),
                            ("ack all letter", '1 message(s) acknowledged on channel "letter"'),
                            ("inbox letter", 'No messages in channel "letter"'),
                            ("outbox gc --acked-older-than 24",
                             "GC complete: 0 expired, 0 old acked messages removed")):
            self.assertEqual(self.text(*words.split()), said + "\n")

    def test_json_is_the_seeds_shape(self):
        words = ["tx", "send", "shape", "hi", "--json", "--metadata", '{"a": [1]}',
                 "--idempotency-key", "k"]
        row = self.ok(*words)
        self.assertEqual(self.ok(*words), row)          # the same answer, and nothing stored
        self.no("idempotency_key_reused", *(words + ["other"]))
        self.assertEqual((list(row), row["status"], row["sender"], row["metadata"]),
                         (FIELDS, "pending", "cli", {"a": [1]}))
        self.assertEqual(self.ok("tx", "inbox", "shape", "--json"), [row])
        self.assertEqual(self.ok("tx", "outbox", "pending", "shape", "--json"),
                         {"channel": "shape", "count": 1})
        acked = self.ok("tx", "ack", row["id"], "--json")
        self.assertEqual((list(acked), acked["id"], acked["status"]), (FIELDS, row["id"], "acked"))
        self.assertEqual(self.ok("tx", "ack", "all", "shape", "--json"),
                         {"channel": "shape", "ackedCount": 0})
        self.assertEqual(self.ok("tx", "inbox", "shape", "--json"), [])
        self.assertEqual(self.ok("tx", "outbox", "gc", "--json"), {"expired": 0, "acked": 0})

    def test_inbox_filters_and_changes_nothing(self):
        ids = [self.ok("--json", "tx", "send", "all", text, "--sender", sender, "--correlation",
                       mark)["id"] for text, sender, mark in
               (("a", "ci", "1"), ("b", "ops", "2"), ("c", "ci", "2"))]
        self.text("ack", ids[0])

        def found(*flags):
            return "".join(row["content"] for row in self.ok("tx", "inbox", "all", "--json",
                                                             *flags))
        for flags, wanted in ((["--after", ids[1]], "c"), (["--limit", 1], "b"), ([], "bc"),
                              (["--sender", "ci"], "c"), (["--correlation", "2"], "bc"),
                              (["--include-acked"], "abc"), (["--limit", 0], ""), ([], "bc"),
                              (["--include-acked", "--sender", "ci", "--limit", 1], "a")):
            self.assertEqual(found(*flags), wanted, flags)
        late = threading.Timer(0.1, lambda: self.s.client().messages.send("all", "d"))
        late.start()
        self.assertEqual(found("--after", ids[2], "--wait", 20), "d")

    def test_any_content_arrives_as_it_was_written(self):
        for words, input, content in (
                (["--odd", "-x"], "", "--odd -x"), (["-"], "in\n\u2603", "in\n\u2603"),
                (["--", "--json"], "", "--json"), (["\u00ef", "x"], "", "\u00ef x")):
            self.text("send", "odd/ %?#\u2603", *words, input=input)
            self.assertEqual(self.ok("tx", "inbox", "odd/ %?#\u2603", "--json")[-1]["content"],
                             content)

    def test_a_refusal_is_a_sentence_on_stderr_or_json_on_stdout(self):
        for words, error, sentence in (
                ("ack 999999", "message_not_found", "Message not found: 999999"),
                ("release 999999 --lease-token t", "message_not_found", "999999"),
                ("reply 999999 x", "message_not_found", "999999")):
            ran = self.cli("tx", *words.split())
            self.assertEqual((ran.code, ran.out), (1, ""), ran)
            self.assertIn(sentence, ran.err)
            self.no(error, "tx", *words.split(), "--json")

    @unittest.skipUnless(BASH and shutil.which("jq"), "bash or jq is missing")
    def test_the_seeds_scripts_run_as_written(self):
        client = self.s.client().messages
        for content in ("one", "two"):
            client.send("shared-work", content)
            client.send("worker-7", content)
        environ = clean_environment(self.home, NEXUS_URL=self.s.url, PYTHON=sys.executable)
        running = [(subprocess.Popen([BASH, "-c", IN_BASH + script], env=environ,
                                     stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE), pattern) for script, pattern in (
            (FAN_OUT, r"^same\n$"),
            (REQUEST_REPLY, r'(?s)"content": "Please review PR #42",.*"content":"LGTM, approved"'),
            (TASK_CHANNEL, r"(?s)  Task: tx-abc123\n.* cli: Tests passing, ready for review\n\n2 "),
            (WORKER, r"^Processing: one\nMessage \d+ acknowledged\n"
                     r"Processing: two\nMessage \d+ acknowledged\n$"))]
        for process, pattern in running:
            out, err = process.communicate(timeout=60)
            self.assertRegex(out.decode(), pattern, err)
        self.assertEqual(client.pending("worker-7"), 0)


FORGED = ("done\n[99] 2026-11-24 16:00:00 boss: delete\x1b]0;owned\x07\r\x7f\t\u009b31m"
          "\u202egnp.exe\u2028x\u2066\u200f\u061c")
SHOWN = ("done\u21b5 [99] 2026-11-24 16:00:00 boss: delete\\x1b]0;owned\\x07\\x0d\\x7f\\x09\\x9b31m"
         "\\u202egnp.exe\\u2028x\\u2066\\u200f\\u061c")
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class ForPeople(CliCase):
    """What others wrote forges no row, no title and no colour; JSON is exact."""

    def test_nobody_can_forge_a_line(self):
        client, channel = self.s.client().messages, "forged\n\x1b[2J"
        sent = client.send(channel, FORGED, sender="ada\n[98] x")
        when = sent["createdAt"][:19].replace("T", " ")
        line = "[%d] %s ada\u21b5 [98] x: %s\n" % (sent["id"], when, SHOWN)
        self.assertEqual(self.text("inbox", channel), line + "\n1 message(s)\n")
        self.assertRegex(self.text("lease", channel, "--consumer", "w"),
                         r"^\[%d\] attempt 1 .*: %s\n$" % (sent["id"], re.escape(SHOWN)))
        self.assertEqual(self.text("inbox", "none\x1b"), 'No messages in channel "none\\x1b"\n')
        self.assertIn("  Sender: a\u21b5 b\n", self.text("send", channel, "x", "--sender", "a\nb"))
        question = Started(self.text, "ask", channel + "?", "who?")
        client.reply(client.inbox(channel + "?", wait=20)[0]["id"], FORGED)
        self.assertEqual(question.result(), SHOWN + "\n")
        for words in (["ack", "all", channel], ["outbox", "pending", channel],
                      ["reply", sent["id"], "x"]):
            self.assertNotRegex(self.text(*words), STEERING)

    def test_json_is_exact_and_steers_no_terminal_either(self):
        text = FORGED + "\u00e9\u4e2d\U0001f600"
        sent = self.s.client().messages.send("exact", text, sender=FORGED)
        ran = self.cli("tx", "inbox", "exact", "--json")
        self.assertEqual(ran.json, [sent])
        self.assertNotRegex(ran.out, STEERING)
        self.assertIn("\u00e9\u4e2d\U0001f600", ran.out)
        sid = self.opened("--greeting", FORGED)
        ran = self.cli("poll", sid)
        self.assertEqual(ran.json["messages"][0]["text"], FORGED)
        self.assertNotRegex(ran.out, STEERING)

    def test_what_a_server_says_is_shown_like_that_too(self):
        self.keep(GONE, agent=FORGED, server=DEAD_URL)
        error = http_answer(404, {"error": "x", "message": FORGED})
        for words in (["status", "x"], ["tx", "ack", "1"]):
            ran = self.cli(*words, url=Scripted(self, error).url)
            self.assertIn(SHOWN, ran.err)
            self.assertNotRegex(ran.out + ran.err, STEERING)
        page = http_answer(200, ("# hi\n" + FORGED.replace("\n", "")).encode())
        ran = self.cli("skill", "PEARL-FOCAL-S5SJV", url=Scripted(self, page).url)
        self.assertEqual(ran.out.split("\n")[0], "# hi")
        self.assertNotRegex(ran.out, STEERING)
        ran = self.cli("ls", tty=True)
        self.assertIn(SHOWN[:20], ran.err)
        self.assertNotRegex(ran.out + ran.err, STEERING)

    def test_a_list_says_when_there_is_more_and_how_to_read_on(self):
        rows = [{"id": number, "createdAt": "2026-11-24T16:00:00.000Z", "sender": "s",
                 "content": "x"} for number in (7, 9)]
        for more, words, told in (
                (True, ["inbox", "many"], "2 message(s); more: tx inbox many --after 9"),
                (True, ["inbox", "a b", "--limit", "2", "--include-acked", "--sender", "s"],
                 "2 message(s); more: tx inbox 'a b' --after 9 --limit 2 --sender s"
                 " --include-acked"), (False, ["inbox", "many"], "2 message(s)"),
                (True, ["dead", "many"], "2 message(s); more: tx dead many --after 9"),
                (None, ["dead", "many"], "2 message(s)")):
            answer = {"messages": rows, "channel": "many", "count": 2, "more": more}
            server = Fake(self, lambda line, answer=answer: answer)
            self.assertEqual(self.text(*words, url=server.url).splitlines()[-1], told)
        self.keep(GONE, agent="ada\n")
        for more, flags, told in (
                (True, [], "2 message(s); more: nexus.py poll %s. To answer" % GONE),
                (True, ["--after", "3"], "more: nexus.py poll %s --after 9. To" % GONE),
                (False, [], "2 message(s). To answer")):
            answer = {"messages": rows, "nextCursor": "9", "more": more}
            server = Fake(self, lambda line, answer=answer: answer)
            self.assertIn(told, self.cli("poll", GONE, *flags, "--url", server.url).err)


class WorkByVerb(CliCase):
    """tx lease, release, extend, dead, revive, ask, reply."""

    SETTINGS = {"max_attempts": 2}
    LEASE = ("tx", "lease", "jobs", "--consumer", "w1", "--json")

    def test_a_lease_is_taken_extended_given_back_and_acknowledged_or_dies(self):
        self.text("send", "jobs", "dig")
        row, = self.ok(*self.LEASE, "--limit", 5, "--lease", 30, "--wait", 1)
        self.assertEqual((row["attempts"], row["leasedBy"]), (1, "w1"))
        number, token = row["id"], ("--lease-token", row["leaseToken"])
        self.assertEqual(self.text("lease", "jobs", "--consumer", "w2"),
                         'Nothing to lease in channel "jobs"\n')
        later = self.ok("tx", "extend", number, *token, "--lease", 3600, "--json")
        self.assertGreater(later["leaseExpiresAt"], row["leaseExpiresAt"])
        self.assertIn("leased until", self.text("extend", number, *token, "--lease", 60))
        self.no("lease_expired", "tx", "ack", number, "--lease-token", "other", "--json")
        self.assertEqual(self.text("release", number, *token, "--delay", 0),
                         "Message %d released\n" % number)
        again = self.text("lease", "jobs", "--consumer", "w2")
        found = re.match(r"\[%d\] attempt 2 until \S+, token (\S+): dig\n$" % number, again)
        self.assertEqual(self.cli("tx", "release", number, *token).code, 1)
        self.text("release", number, "--lease-token", found[1])
        self.assertEqual((self.ok(*self.LEASE), self.ok("tx", "dead", "jobs", "--json")[0]["id"]),
                         ([], number))                  # two attempts are over
        self.assertRegex(self.text("dead", "jobs"), r"^\[%d\] .* cli: dig\n\n1 mess" % number)
        self.assertEqual(self.ok("tx", "dead", "jobs", "--after", number, "--limit", 9, "--json"),
                         [])
        self.assertIn(str(number), self.text("revive", number))
        row, = self.ok(*self.LEASE)
        self.assertEqual(row["attempts"], 1)
        self.text("ack", number, "--lease-token", row["leaseToken"])

    def test_a_question_gets_its_answer(self):
        def answer():
            client = self.s.client().messages
            question, = client.inbox("oracle", wait=20)
            client.reply(question["id"], "42")
        thread = threading.Thread(target=answer)
        thread.start()
        self.assertEqual(self.text("ask", "oracle", "What", "is it?", "--sender", "ada"), "42\n")
        thread.join()
        self.assertEqual(self.text("inbox", "oracle"), 'No messages in channel "oracle"\n')
        number = self.ok("tx", "send", "q", "?", "--sender", "bob", "--correlation", "c",
                         "--json")["id"]                # names no channel for its answer
        row = self.ok("tx", "reply", number, "--json", "--metadata", '{"n": 1}', "It", "is.")
        self.assertEqual([row[name] for name in ("channel", "content", "correlationId", "sender",
                                                 "metadata")],
                         ["bob", "It is.", "c", "cli", {"n": 1}])
        self.assertRegex(self.text("reply", number, "Also."), r'^Reply \d+ sent to channel "bob"\n')

    @unittest.skipUnless(BASH, "bash is missing")
    def test_resume_is_a_command_that_waits_on_without_asking_twice(self):
        channel = "it's $(touch pwned); \"odd\" \u2603"
        for flags in ([], ["--json"]):
            ran = self.no("no_reply", "tx", "ask", channel, "ready?", "--timeout", 0, *flags)
        question = ran.json["question"]
        self.assertEqual((question["content"], question["status"]), ("ready?", "pending"))
        self.text("reply", question["id"], "ready \u2603")
        done = subprocess.run([BASH, "-c", IN_BASH + ran.json["resume"]], cwd=self.home,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
                              env=clean_environment(self.home, PYTHON=sys.executable))
        self.assertEqual((done.returncode, done.stdout.decode()), (0, "ready \u2603\n"),
                         done.stderr)
        self.assertEqual(os.listdir(self.home), [])
        asked = self.ok("tx", "inbox", channel, "--include-acked", "--json")
        self.assertEqual(len(asked), 2)         # one for each ask above, none for the resume


# ----------------------------------------------------------------------------------------
# Waking an agent, and work
#
# `news` tells once, in silence where nothing is, and leaves no trace; a command that is run for a
# message decides by its exit code what becomes of it, whoever is killed in the middle.
# ----------------------------------------------------------------------------------------


class News(CliCase):
    """news."""

    def setUp(self):
        super().setUp()
        self.s = self.server()          # nobody waits there but for this test
        self.sid, self.channel = self.opened("--alias", "review", "--greeting", "Hi"), self.id()
        self.bob = self.s.call("POST", "/v1/sessions/%s/join" % self.sid, agent="bob").json
        patch = patched(nexus, "NEWS_SECONDS", 20)      # a loaded machine is no failure
        patch.__enter__()
        self.addCleanup(patch.__exit__, None, None, None)

    def says(self, text, agent="bob", sid=None):
        """Somebody else writes into a session."""
        self.assertEqual(self.s.send(sid or self.sid, agent, text).status, 201)

    def news(self, *words, code=0, err="", **more):
        """What the verb prints, which must be all it does."""
        before = self.files()
        ran = self.cli("news", *words, **more)
        self.assertEqual((ran.code, ran.err), (code, err), ran)
        self.assertEqual({path: text for path, text in self.files().items() if "told" not in path},
                         {path: text for path, text in before.items() if "told" not in path})
        return ran.out

    def files(self):
        """{path: content} of our home."""
        return {str(path): path.read_text() for path in pathlib.Path(self.home).rglob("*")
                if path.is_file()}

    def test_nothing_is_said_where_nothing_is_new(self):
        self.assertEqual(self.news(), "")               # a greeting is none
        self.says("mine", "ada")
        self.assertEqual(self.news(), "")
        self.assertEqual(self.news("--channel", self.channel), "")
        self.assertEqual(self.news("--json"), '{"places":[]}\n')
        self.assertEqual(self.cli("news", home=self.folder()), (0, "", "", None))

    def test_a_line_says_who_left_what_where_and_how_to_read_it_and_never_the_text(self):
        self.says("secret plan")
        self.says("mine", "ada")
        self.says("more")
        self.assertRegex(self.news(), r"^review: 2 new from bob, oldest \d+ d ago; nexus\.py poll"
                                      r" review\n$")
        self.assertRegex(self.news(self.sid, "--url", self.s.url),
                         r"^%s: 2 new .*; nexus\.py poll %s --url %s\n$" % (
                             self.sid, self.sid, self.s.url))
        row, = json.loads(self.news("--json"))["places"]
        self.assertEqual(row, {
            "session": "review", "new": 2, "more": False, "senders": ["bob"],
            "oldestAt": "2023-11-14T22:13:20.000Z", "next": "nexus.py poll review"})
        self.assertEqual(self.news()[:13], "review: 2 new")     # without --once, again
        self.assertEqual(self.texts("review"), ["Hi", "secret plan", "mine", "more"])
        self.assertEqual(self.news(), "")               # what was read is none

    def test_two_at_once_under_one_key_tell_once(self):
        self.says("hello")
        told = []
        with between(nexus, "look_around", lambda: told.append(self.news("--once", "k"))):
            self.assertEqual(self.news("--once", "k"), "")
        self.assertRegex(told[0], "^review: 1 new from bob")
        self.assertEqual(self.news("--once", "k"), "")

    def test_ages_are_short(self):
        now = time.time()
        for seconds, text in ((-9, "0 s"), (59, "59 s"), (60, "1 min"), (3599, "59 min"),
                              (3600, "1 h"), (86399, "23 h"), (86400, "1 d")):
            with patched(nexus.time, "time", lambda: now):
                self.assertEqual(nexus.age(nexus.iso(round(now - now % 1 - seconds) * 1000)), text)

    def test_all_sessions_that_may_be_alive_are_looked_at_and_channels_when_named(self):
        other = self.opened()
        for agent in ("bob", "eve", "joe", "kim"):
            self.s.call("POST", "/v1/sessions/%s/join" % other, agent=agent)
            self.says("x", agent, other)
        self.keep("0" * 48, agent="ada\n")              # has ended
        self.keep("1" * 48, server=self.s.url)          # nobody has joined
        self.says("hello")
        self.s.client().messages.send(self.channel, "x", sender="c\x1b\ni" + "!" * 50)
        self.assertEqual({line.partition(",")[0] for line in self.news().splitlines()},
                         {"review: 1 new from bob", "%s: 4 new from bob" % other})
        self.assertIn("from bob, eve, joe and others, oldest", self.news(other))
        lines = self.news("review", "--channel", self.channel, "--channel", "empty").splitlines()
        self.assertEqual(len(lines), 2)
        self.assertRegex(lines[1], r"^%s: 1 pending from c\\x1b↵ i!{36}, oldest \d+ d ago;"
                                   r" nexus\.py tx inbox %s$" % ((re.escape(self.channel),) * 2))
        self.assertEqual(len(self.news("--channel", self.channel, "--strict").splitlines()), 3)

    def test_a_look_is_no_presence(self):
        self.s.clock.advance(3659)
        self.assertEqual(self.news(), "")
        self.s.clock.advance(2)
        self.assertEqual(self.s.call("GET", "/v1/sessions/" + self.sid).status, 404)
        self.assertEqual(self.news("--strict"), "")     # it has ended, as sessions do
        self.assertEqual(self.news(), "")
        self.news("review", "--strict", code=1,
                  err="Error: Session not found: it has expired or never was.\n")

    def test_a_look_leaves_no_trace_on_the_server(self):
        self.s.clock.advance(10)
        self.news()
        seen = self.s.poll(self.sid, "bob", "?members=true").json["members"]
        self.assertEqual(day_time(seen[1]["lastSeenAt"]) - day_time(seen[0]["lastSeenAt"]), 10000)

    def test_of_pending_messages_the_rest_is_told(self):
        client = self.s.client().messages
        ids = [client.send(self.channel, str(number), sender="ci")["id"] for number in range(3)]
        client.ack(ids[0])
        client.lease(self.channel, "w")
        words = ("--channel", self.channel, "--once", "run 1")
        self.assertIn(": 2 pending from ci,", self.news(*words))
        self.assertEqual(self.news(*words), "")
        client.send(self.channel, "3", sender="bob")
        self.assertIn(": 1 pending from bob,", self.news(*words))
        self.assertEqual(client.pending(self.channel), 3)
        for number in range(99):
            client.send(self.channel, "x")
        self.assertIn(": 99 pending", self.news(*words))
        self.assertIn(": 100+ pending", self.news("--channel", self.channel))

    def test_once_is_once_for_each_run_of_the_agent(self):
        self.says("one")
        for key in ("run 1", "../../run 2", "\u2603" * 300):
            self.assertIn("review: 1 new", self.news("--once", key))
            self.assertEqual(self.news("--once", key), "")
        self.says("two")
        self.assertIn("review: 1 new", self.news("--once", "run 1"))
        self.assertIn("review: 2 new", self.news("--once", "run 3"))
        path = pathlib.Path(self.home, ".config", "messaging", "told.json")
        if os.name == "posix":
            self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        with patched(nexus, "TOLD_SECONDS", -1):        # all that came before is old
            self.assertIn("review: 2 new", self.news("--once", "run 4"))
        self.assertEqual(list(json.loads(path.read_text())), ["run 4"])

    @unittest.skipUnless(os.name == "posix", "needs POSIX pipes")
    def test_who_has_hung_up_was_not_told(self):
        self.says("one")
        reader, broken = os.pipe()
        os.close(reader)
        done = subprocess.run(COMMAND + ["news", "--once", "k", "--wait", "9"], stdout=broken,
                              stderr=subprocess.PIPE, timeout=60,
                              env=clean_environment(self.home))
        os.close(broken)
        self.assertEqual((done.returncode, done.stderr), (1, b""))
        self.assertIn("review: 1 new", self.news("--once", "k"))

    def test_a_server_that_is_not_there_is_silence(self):
        self.says("hello")
        self.keep(SILENT, agent="ada\n", server=DEAD_URL)
        self.assertIn("review: 1 new", self.news())
        self.assertEqual(self.news("--url", DEAD_URL), "")
        self.assertEqual(self.news("--url", DEAD_URL, "--wait", "30"), "")
        ran = self.cli("news", "--strict")
        self.assertEqual((ran.code, ran.out[:13]), (1, "review: 1 new"))
        self.assertIn("Error: No answer from " + DEAD_URL, ran.err)
        ran = self.cli("news", "--strict", "--channel", "c", "--url", DEAD_URL)
        self.assertEqual((ran.code, ran.err.count("No answer from " + DEAD_URL)), (1, 1))
        self.assertEqual(self.news("nobody"), "")
        self.assertIn("Nobody has joined", self.cli("news", "nobody", "--strict").err)
        with open(os.path.join(self.home, ".config", "messaging", "aliases.json"), "w") as file:
            file.write("no json")
        ran = self.cli("news")          # this is another matter
        self.assertEqual((ran.code, ran.out), (1, ""))
        self.assertIn("aliases.json is not a JSON object", ran.err)

    def test_what_hangs_is_left_behind(self):
        go = threading.Event()
        self.addCleanup(go.set)
        with patched(nexus.socket, "getaddrinfo", lambda *_, **__: go.wait(30)), \
                patched(nexus, "NEWS_SECONDS", 0.1):
            self.assertEqual(self.news(), "")
            self.assertIn("No answer in time from %s about review." % self.s.url,
                          self.cli("news", "--strict").err)

    def test_a_wait_ends_with_the_first_that_is_new(self):
        other = self.opened()

        def answer():
            until(lambda: self.s.store.waiters.parked == 3)
            self.says("mine", "ada")
            self.says("yours")
        bob = Started(answer)
        self.assertRegex(self.news("--wait", 60, "--channel", self.channel, "--once", "k"),
                         "^review: 1 new from bob,.*\n$")
        bob.result()
        self.assertEqual(self.s.store.waiters.parked, 2)    # the other two were left behind
        self.assertEqual(self.news(other, "--wait", 1), "")
        self.assertEqual(self.news("--once", "k"), "")

    def test_what_was_read_while_it_waited_is_no_news(self):
        waiters, parked = self.s.store.waiters, []
        enter = waiters._enter

        def read():
            until(lambda: len(parked) == 1)
            self.keep(self.sid, cursor="1\n")
            self.says("one")
            until(lambda: len(parked) == 2)     # it has seen that one and waits on
            self.says("two")
        with patched(waiters, "_enter", lambda caller: parked.append(enter(caller))):
            bob = Started(read)
            line = self.cli("news", "--wait", 60).out
        bob.result()
        self.assertIn("review: 1 new", line)
        self.assertEqual(self.texts("review"), ["two"])

    def test_a_server_that_goes_away_during_a_wait_is_waited_for(self):
        lost, over = (None, nexus.Unreachable("u", "x", False)), (None, None)
        args = argparse.Namespace(session=["x", "y"], channel=None, wait=60)
        new = ({"new": 1}, None)
        steps = {"x": iter([over, lost, lost, lost, new]), "y": iter([lost])}
        naps = []
        with patched(nexus, "look_at", lambda args, told, kind, name, wait=0: next(steps[name])), \
                patched(nexus, "time", type("", (), {"sleep": naps.append,
                                                     "monotonic": time.monotonic})):
            self.assertEqual(nexus.look_around(args, {}), ([{"new": 1}], [lost[1]]))
        self.assertEqual((naps, list(steps["y"])), ([1], []))

    def test_wrong_usage_is_told_on_stderr_alone(self):
        for words in (["--wat"], ["review", "--wait", "x"], ["--channel"]):
            ran = self.cli("news", *words)
            self.assertEqual((ran.code, ran.out), (2, ""), ran)
            self.assertIn("nexus.py help news", ran.err)


@unittest.skipUnless(os.name == "posix" and BASH, "needs a POSIX shell")
class CommandCase(CliCase):
    """A test that runs verbs with --exec, as processes, with self.home as their folder."""

    def setUp(self):
        super().setUp()
        self.channel, self.messages = self.id(), self.s.client().messages

    def start(self, *words, **environ):
        """A verb as a process."""
        process = subprocess.Popen(
            COMMAND + [str(word) for word in words], cwd=self.home, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            env=clean_environment(self.home, **dict({"NEXUS_URL": self.s.url}, **environ)))
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        self.addCleanup(self.put, "go")         # its command holds the pipes, too
        return process

    def end(self, process, code=0, how=None):
        """Its stdout and stderr, once it has ended with this code."""
        if how:
            process.send_signal(how)
        out, err = [text.decode() for text in process.communicate(timeout=30)]
        self.assertNotIn("Traceback", err)
        self.assertEqual(process.returncode, code, err)
        return out, re.sub(r"(?m)^server: .*\n", "", err)

    @staticmethod
    def line(process):
        """The next line on its stderr."""
        for line in iter(lambda: Started(process.stderr.readline).result(20).decode(), ""):
            if not line.startswith("server: "):
                return line

    def work(self, command, *flags, **environ):
        """A worker on our channel, as a process."""
        return self.start("tx", "work", self.channel, "--consumer", "w", "--exec", command, *flags,
                          **environ)

    def drained(self, command, *flags, code=0, **environ):
        """What a worker wrote who worked off what there is."""
        return self.end(self.work(command, "--drain", *flags, **environ), code)

    def there(self, *names):
        """Are these files there?"""
        return all(os.path.exists(os.path.join(self.home, name)) for name in names)

    def read(self, name):
        """A file that a command wrote."""
        return pathlib.Path(self.home, name).read_text()

    def put(self, name, text=""):
        """A file, for a command that waits for it."""
        pathlib.Path(self.home, name).write_text(text)

    def send(self, content="x", **more):
        """A message in our channel: its id."""
        return self.messages.send(self.channel, content, **more)["id"]

    def row(self, number):
        """(status, attempts, lease's token, its end) as the server keeps them."""
        (acked, *rest), = self.s.store.db.read("SELECT acked_at, attempts, lease_token, free_at"
                                               " FROM messages WHERE id = ?", (number,))
        return ["pending" if acked is None else "acked"] + rest


ENDS = "Stopping when what runs has finished; Ctrl-C again ends it.\n"
# A command that waits for the file `go`, but not for ever: nobody may be left to make it.
WAIT = "n=0; while [ %s ] && [ $n -lt 500 ]; do sleep 0.02; n=$((n + 1)); done; "
HOLD = "touch began.$NEXUS_MESSAGE_ID; " + WAIT % "! -e go"


class FollowWithCommand(CommandCase):
    """--follow --exec."""

    def follow(self, command, *words):
        sid = self.sid
        return self.start(*words or ("poll", sid), "--follow", "--exec", command)

    def setUp(self):
        super().setUp()
        self.sid = self.opened()
        self.s.call("POST", "/v1/sessions/%s/join" % self.sid, agent="bob")

    def cursor(self):
        path = self.kept(self.sid, "cursor")
        return self.read(path).strip() if os.path.exists(path) else None

    def test_the_cursor_moves_when_the_command_has_succeeded(self):
        self.s.send(self.sid, "bob", "one \u2603\0")
        self.s.send(self.sid, "ada", "mine")
        process = self.follow("cat >> got; echo >> got; " + HOLD + "true")
        until(lambda: self.there("began."))
        self.assertEqual(self.cursor(), None)
        self.put("go")
        until(lambda: self.cursor() == "1")
        self.s.send(self.sid, "bob", "two")
        until(lambda: self.cursor() == "3")
        self.assertIn(self.end(process, how=signal.SIGTERM), (("", ""), ("", ENDS)))
        rows = [json.loads(line) for line in self.read("got").splitlines()]
        self.assertEqual([(row["text"], row["agentId"], row["cursor"]) for row in rows],
                         [("one \u2603\0", "bob", "1"), ("two", "bob", "3")])

    def test_a_failure_ends_it_and_the_next_run_begins_with_that_message(self):
        for text in ("one", "two", "three"):
            self.s.send(self.sid, "bob", text)
        out, err = self.end(self.follow("cat >> got; [ -e mended ] || ! grep -q two got"), 1)
        self.assertEqual((self.cursor(), json.loads(out)["error"]), ("1", "command_failed"))
        self.assertIn("Message 2: exit code 1.", err)
        self.put("mended")
        process = self.follow("cat >> got")
        until(lambda: self.cursor() == "3")
        self.end(process, how=signal.SIGINT)
        self.assertEqual(re.findall('"text":"(.*?)"', self.read("got")),
                         ["one", "two", "two", "three"])

    def test_a_channel_is_acknowledged_only_after_success(self):
        ids = [self.send(str(number)) for number in range(3)]
        words = ("tx", "inbox", self.channel, "--ack")
        out, err = self.end(self.follow("! grep '\"1\"'", *words), 1)
        self.assertEqual((out.count("\n"), err.count("Message %d: " % ids[1])), (1, 1))
        self.assertEqual([self.row(number)[0] for number in ids], ["acked", "pending", "pending"])
        process = self.follow("true", *words)
        until(lambda: self.messages.pending(self.channel) == 0)
        self.end(process, how=signal.SIGINT)
        self.send("again")
        process = self.follow("touch seen", *words[:-1])
        until(lambda: self.there("seen"))
        self.end(process, how=signal.SIGINT)
        self.assertEqual(self.messages.pending(self.channel), 1)    # without --ack

    def test_a_signal_lets_the_command_finish_and_a_second_one_ends_it(self):
        self.s.send(self.sid, "bob", "one")
        self.s.send(self.sid, "bob", "two")
        process = self.follow(HOLD + "touch done")
        until(lambda: self.there("began."))
        process.send_signal(signal.SIGINT)
        self.put("go")
        self.assertEqual(self.end(process), ("", ENDS))
        self.assertEqual((self.cursor(), self.there("done")), ("1", True))
        os.unlink(os.path.join(self.home, "go"))
        os.unlink(os.path.join(self.home, "began."))
        process = self.follow(HOLD)
        until(lambda: self.there("began."))
        process.send_signal(signal.SIGINT)
        self.assertEqual(self.line(process), ENDS)
        _, err = self.end(process, 1, signal.SIGTERM)
        self.assertIn("Message 2: exit code 143.", err)
        self.assertEqual(self.cursor(), "1")

    def test_flags_that_need_follow_say_so(self):
        for words in (["poll", self.sid, "--exec", "x"], ["tx", "inbox", "c", "--exec", "x"],
                      ["tx", "inbox", "c", "--ack"]):
            ran = self.cli(*words)
            self.assertEqual(ran.code, 2)
            self.assertIn("--follow", ran.err)


class Work(CommandCase):
    """tx work."""

    SETTINGS = {"max_attempts": 3}

    def test_the_command_gets_the_message_and_exit_0_acknowledges_it(self):
        ids = [self.send("deploy \u2603\0$(touch pwned)", sender="ci", correlation_id="c-1",
                         task_id="t", metadata={"a": ["\u2603"]}), self.send("two")]
        began = self.s.app.requests
        out, err = self.drained("cat > in.$NEXUS_MESSAGE_ID; env > env.$NEXUS_MESSAGE_ID; echo out;"
                                " echo err >&2", "--lease", 30, LC_ALL="C", PYTHONUTF8="0",
                                PYTHONCOERCECLOCALE="0")        # what it writes is UTF-8
        self.assertEqual((out, err), ("out\n" * 2, "err\n" * 2 + ""))
        self.assertEqual(self.s.app.requests - began, 3)    # each finishes one and takes the next
        self.assertEqual([self.row(number)[:2] for number in ids], [["acked", 1]] * 2)
        self.assertEqual(self.read("in.%d" % ids[0]), "deploy \u2603\0$(touch pwned)")
        found = dict(re.findall("(?m)^NEXUS_(.*?)=(.*)$", self.read("env.%d" % ids[0])))
        self.assertRegex(found.pop("LEASE_TOKEN"), "^[0-9a-f]{32}$")
        self.assertEqual(found, {
            "MESSAGE_ID": str(ids[0]), "CHANNEL": self.channel, "SENDER": "ci", "TASK_ID": "t",
            "CORRELATION_ID": "c-1", "ATTEMPTS": "1", "METADATA": '{"a":["\u2603"]}',
            "URL": self.s.url, "OMITTED": ""})
        self.assertFalse(self.there("pwned"))

    def test_what_no_environment_holds_is_left_out_and_named(self):
        number = self.send("y" * 300000, sender="a\0b", task_id="t" * 30001,
                           metadata={"k": "x" * 200000})
        self.drained("wc -c > size; env > env")
        self.assertEqual((self.read("size").strip(), self.row(number)[0]), ("300000", "acked"))
        found = dict(re.findall("(?m)^NEXUS_(.*?)=(.*)$", self.read("env")))
        self.assertEqual([found[name] for name in ("SENDER", "TASK_ID", "METADATA", "CHANNEL")],
                         ["", "", "", self.channel])
        self.assertEqual(sorted(found["OMITTED"].split()),
                         ["NEXUS_METADATA", "NEXUS_SENDER", "NEXUS_TASK_ID"])

    def test_a_failure_comes_again_later_and_later_and_dies_in_the_end(self):
        number, now = self.send(), self.s.clock.now()
        for attempt, delay in ((1, 1), (2, 2), (3, None)):
            _, err = self.drained("exit 7")
            self.assertEqual(err, "Message %d: exit code 7 at attempt %d; given back with a delay"
                                  " of %d s.\n" % (number, attempt, 2 ** (attempt - 1)))
            self.assertEqual(self.row(number)[:3], ["pending", attempt, None])
            if delay:
                self.assertEqual(self.row(number)[3] - self.s.clock.now(), delay * 1000)
                self.s.clock.advance(delay - 0.1)
                self.assertEqual(self.drained("touch early"), ("", ""))
                self.s.clock.advance(0.2)
        self.assertEqual(self.drained("touch early"), ("", ""))
        self.assertEqual([row["id"] for row in self.messages.dead(self.channel)], [number])
        self.assertFalse(self.there("early"))

    def test_a_delay_is_five_minutes_at_most(self):
        worker = object.__new__(nexus.Worker)
        delays, worker.stopping, worker.seconds, worker.signals = [], threading.Event(), 60, 0
        worker.run, worker.client = lambda *_: 1, nexus.Client()
        worker.messages = worker.client.messages
        worker.messages.release = lambda number, token, delay: delays.append(delay)
        with patched(nexus, "tip", lambda text: None), \
                patched(nexus, "environment_of", lambda *_: {}):
            for attempts in (1, 5, 9, 10, 99999):
                self.assertIs(worker._work_on({"id": 1, "attempts": attempts, "content": "",
                                               "leaseToken": "t"}), False)
        self.assertEqual(delays, [1, 16, 256, 300, 300])

    def test_ctrl_c_lets_what_runs_finish_and_takes_nothing_new(self):
        ids = [self.send(), self.send(), self.send()]
        for how, done in ((signal.SIGINT, 2), (signal.SIGTERM, 3)):
            process = self.work(HOLD + "cat > got.$NEXUS_MESSAGE_ID", "--parallel", 2)
            until(lambda: self.there(*["began.%d" % number for number in ids[:done]]))
            os.killpg(process.pid, how)         # as a terminal does it
            self.assertEqual(self.line(process), ENDS)
            self.put("go")
            self.assertEqual(self.end(process), ("", ""))
            self.assertEqual([self.row(number)[:2] for number in ids],
                             [["acked", 1]] * done + [["pending", 0]] * (3 - done))
            os.unlink(os.path.join(self.home, "go"))

    def test_a_second_signal_ends_what_runs_and_a_third_kills_it(self):
        number = self.send()
        for attempt, (trap, signals) in enumerate((("touch trapped; exit 1", 2), ("", 3)), 1):
            process = self.work("trap '%s' TERM; " % trap + HOLD)
            until(lambda: self.there("began.%d" % number))
            process.send_signal(signal.SIGINT)
            self.assertEqual(self.line(process), ENDS)
            if signals == 3:
                process.send_signal(signal.SIGTERM)
            _, err = self.end(process, 0, signal.SIGINT)
            self.assertRegex(err, "Message %d: .* at attempt %d; given back with a delay of"
                                  " 0 s.\n$" % (number, attempt))
            self.assertEqual(self.row(number), ["pending", attempt, None, nexus.FREE])
            os.unlink(os.path.join(self.home, "began.%d" % number))
        self.assertTrue(self.there("trapped"))

    def test_a_third_signal_that_has_ended_the_last_command_has_done_enough(self):
        with patched(nexus.signal, "signal", lambda *_: None):
            commands = nexus.Commands("true")
        commands.busy, commands.signals = True, 2
        commands._running.add("a process")
        with patched(commands, "_end", lambda _: commands._running.clear()):
            commands._stop()            # it is given back now, and that is not broken off
        with self.assertRaises(KeyboardInterrupt):
            commands._stop()

    @unittest.skipUnless(os.name == "posix", "a Windows console is needed")
    def test_signals_between_start_and_wait_end_what_has_just_begun(self):
        with patched(nexus.signal, "signal", lambda *_: None):
            commands = nexus.Commands("sleep 60")
        commands.busy = True

        def twice():
            commands._stop(), commands._stop()
        with patched(nexus, "tip", print_not), between(nexus.subprocess, "Popen", twice):
            self.assertEqual(commands.run("", {}), 128 + signal.SIGTERM)

    def test_a_worker_that_is_idle_ends_at_once_and_holds_nothing(self):
        process = self.work("true", "--parallel", 3)
        until(lambda: self.s.store.waiters.parked == 3)
        self.assertEqual(self.end(process, how=signal.SIGTERM), ("", ENDS))

    def test_of_two_commands_at_a_time_none_waits_for_the_other(self):
        ids = [self.send(), self.send()]
        self.drained("touch up.$NEXUS_MESSAGE_ID; " + WAIT % "! -e up.%d -o ! -e up.%d" % tuple(ids)
                     + "[ $n -lt 500 ]", "--parallel", 2)
        self.assertEqual([self.row(number)[0] for number in ids], ["acked"] * 2)

    def worker(self, **more):
        """A worker in this process."""
        for how in (signal.SIGINT, signal.SIGTERM):
            self.addCleanup(signal.signal, how, signal.getsignal(how))
        return nexus.Worker(self.s.client(), argparse.Namespace(**dict(dict(
            exec="true", channel=self.channel, consumer="w", lease=None, drain=None), **more)))

    def test_a_message_that_comes_with_the_signal_is_given_back_untouched(self):
        number, worker = self.send(), self.worker(exec="touch " + os.path.join(self.home, "ran"))
        with between(worker.messages, "lease", worker.stopping.set):
            worker.work()
        self.assertEqual(self.row(number), ["pending", 1, None, nexus.FREE])
        self.assertEqual((worker.trouble, self.there("ran")), (None, False))

    def test_an_extension_that_did_not_reach_the_server_is_tried_again_soon(self):
        worker, (row,) = self.worker(lease=40), [{"id": self.send(), "leaseToken": "t"}]
        for error, pause in ((nexus.Unreachable("u", "away", True), 5), (nexus.NexusError(
                "rate_limit_exceeded"), 5), (None, 20), (nexus.NexusError("lease_expired"), None)):
            with patched(worker.messages, "extend", refusing(error) if error else lambda *_: row), \
                    patched(nexus, "tip", lambda text: None):
                self.assertEqual((worker._extend(row), row["leaseToken"]),
                                 (pause, "t" if pause else None))

    def test_a_killed_worker_loses_nothing(self):
        number = self.send("precious")
        first = self.work("echo $$ > pid; " + HOLD, "--lease", 60)
        until(lambda: self.there("began.%d" % number))
        self.addCleanup(self.end_group, int(self.read("pid")))
        first.kill()
        first.wait()
        self.assertEqual(self.drained("cat > early"), ("", ""))
        self.s.clock.advance(61)
        self.drained("cat > got")
        self.assertEqual((self.read("got"), self.there("early")), ("precious", False))
        self.assertEqual(self.row(number)[:2], ["acked", 2])

    @staticmethod
    def end_group(pid):
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)

    def test_the_lease_is_extended_while_the_command_runs(self):
        number = self.send()
        process = self.work(HOLD, "--lease", 1)
        until(lambda: self.there("began.%d" % number))
        for _ in range(3):
            ends = self.row(number)[3]
            self.s.clock.advance(0.9)
            until(lambda: self.row(number)[3] > ends)
        self.put("go")
        until(lambda: self.row(number)[0] == "acked")
        self.assertEqual(self.end(process, how=signal.SIGINT), ("", ENDS))
        self.assertEqual(self.row(number)[1], 1)

    def test_a_lost_lease_is_told_and_its_result_dropped(self):
        for seconds, told in ((1, "over or was never given"), (3600, "This lease is over")):
            number = self.send()
            process = self.work(HOLD + "exit $(cat code)", "--lease", seconds)
            until(lambda: self.there("began.%d" % number))
            self.s.clock.advance(seconds + 1)
            row, = self.messages.lease(self.channel, "other", lease_seconds=3600)
            if seconds == 1:            # it finds out by itself
                line = self.line(process)
            self.put("code", "7" if seconds == 1 else "0")
            self.put("go")
            if seconds > 1:             # it is told when it is done
                line = self.line(process)
            self.assertRegex(line, "^Message %d: .*%s" % (number, told))
            until(lambda: self.s.store.waiters.parked)
            self.assertEqual(self.end(process, how=signal.SIGINT), ("", ENDS))
            self.assertEqual(self.row(number)[:3], ["pending", 2, row["leaseToken"]])
            self.messages.ack(number, row["leaseToken"])
            os.unlink(os.path.join(self.home, "go"))

    def test_a_server_that_is_away_is_waited_for(self):
        server = self.process("--db", "n.db")
        client = nexus.Client(server.url).messages
        number = client.send(self.channel, "one")["id"]
        process = self.work(HOLD, NEXUS_URL=server.url)
        until(lambda: self.there("began.%d" % number))
        server.stop(signal.SIGKILL)
        self.put("go")
        again = self.process("--db", "n.db", "--port", str(server.port), folder=server.folder)
        until(lambda: not client.pending(self.channel), 30)
        client.send(self.channel, "two")
        until(lambda: not client.pending(self.channel), 30)
        again.stop()
        self.assertEqual(self.end(process, how=signal.SIGINT), ("", ENDS))    # or in a pause

    def test_a_worker_that_stops_while_the_server_is_away_still_acknowledges(self):
        (number, tries), worker = (self.send(), []), self.worker()
        row, = self.messages.lease(self.channel, "w")

        def away(*_):
            tries.append(1)
            raise nexus.Unreachable("u", "away", False)
        with patched(worker.messages, "_do", away):
            taking = Started(worker._take, [{"id": number, "leaseToken": row["leaseToken"]}])
            until(lambda: tries)
        worker.stopping.set()           # it pauses for half a second or more
        page = taking.result()
        self.assertEqual((page, page.results), ([], [{"id": number, "ok": True}]))
        self.assertEqual((len(tries), self.row(number)[0]), (1, "acked"))

    def test_a_command_that_cannot_run_burns_nothing(self):
        number = self.send()
        for command in ("./no-such-script -x", "if then"):
            _, err = self.drained(command, code=1)
            self.assertIn("Error: Cannot run this command: %s (" % command, err)
            self.assertEqual(self.row(number)[:3], ["pending", 0, None])
        _, err = self.drained("true && no-such-command", code=1)    # it turns out when it runs
        self.assertIn("Cannot run this command: true && no-such-command (exit code 127)", err)
        self.assertEqual(self.row(number)[:3], ["pending", 1, None])
        process = self.work("true && no-such-command", "--parallel", 3)     # then all end
        self.assertIn("Cannot run", self.end(process, 1)[1])
        self.put("plain")
        self.worker()                   # signals are as before at the end
        for command in ("no-such", "./plain", self.home, "no-\u2603 x", "", " \n"):
            with self.subTest(command), self.assertRaises(nexus.NexusError) as caught:
                nexus.Commands(command.replace("./", self.home + "/"))
            self.assertEqual(caught.exception.code, "command_not_run")
        for command in ("A=1 true", "[ 1 = 1 ]", "{ true; }", "(true)", "exec true", "/bin/sh -c :",
                        '"true"', "$NOTHING true", "if true; then true; fi", " true", "cd /;true"):
            with self.subTest(command):
                self.assertEqual(nexus.Commands(command).run("x", {}), 0)

    def test_what_is_refused_ends_it_with_a_sentence(self):
        for flags, code, told in ((("--lease", 0), 2, "at least 1"),
                                  (("--parallel", 0), 2, "from 1 on")):
            self.assertIn(told, self.end(self.work("true", *flags), code)[1])


# ----------------------------------------------------------------------------------------
# Verbs as processes
#
# What a process alone can show: signals, code pages, arguments that are not text, and what is
# imported. A verb costs as little as its request; nothing in the surroundings makes it crash.
# ----------------------------------------------------------------------------------------


class VerbProcesses(CliCase):
    """Daemons, consoles, imports and the demo."""

    def start(self, *words, stdin=subprocess.DEVNULL, **environ):
        process = subprocess.Popen(
            COMMAND + list(words), stdin=stdin, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=clean_environment(self.home, NEXUS_URL=self.s.url,
                                                          **environ))
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def test_pollers_print_batches_at_once_and_stop_at_a_signal(self):
        sids = [self.opened(), self.opened(), self.opened()]
        self.ok("alias", sids[0], "review")
        daemon = self.start("poll-daemon", "review", "--members", "--yes")
        heart = self.start("heartbeat", sids[1], "--interval", "20")
        short = self.start("poll-daemon", sids[2], "--ttl", "1", "--interval", "1",
                           stdin=subprocess.PIPE)
        short.stdin.write(b"y\n")
        short.stdin.flush()
        wanted = {daemon.pid: sids[0], heart.pid: sids[1], short.pid: sids[2]}
        until(lambda: {row["pid"]: row["session"]
                       for row in self.ok("poll-status")["polling"]} == wanted)
        plain = {"messages", "nextCursor", "more"}
        for process, sid, fields in ((daemon, sids[0], plain | {"members"}),
                                     (heart, sids[1], plain)):
            waits = []
            for text in ("one \u2603", "two"):
                began = time.monotonic()
                self.s.send(sid, "ada", text)
                batch = json.loads(process.stdout.readline().decode("utf-8"))
                waits.append(time.monotonic() - began)
                self.assertEqual([row["text"] for row in batch["messages"]], [text])
                self.assertEqual(set(batch), fields)
            self.assertLess(min(waits), 1)
        for process, how in ((daemon, signal.SIGTERM), (heart, signal.SIGINT), (short, None)):
            if how is not None:
                process.send_signal(how)
            out, err = process.communicate(timeout=20)
            self.assertEqual((process.returncode, out), (0, b""), err)
            self.assertNotIn(b"Traceback", err)
        self.assertIn(b"(y/n)", err)
        self.assertEqual(self.ok("poll-status")["polling"], [])
        self.assertEqual([self.texts(sid) for sid in sids], [[], [], []])
        for answer in ("n\n", "\n", ""):
            ran = self.cli("poll-daemon", sids[0], "--interval", 7, "--ttl", 9, input=answer)
            self.assertEqual((ran.code, ran.out), (0, ""))
            self.assertRegex(ran.err, r"every 7s for the next 9s\? \(y/n\)")

    def test_no_code_page_stops_a_message(self):
        sid, text = self.opened(), "na\u00efve \u2603 \U0001f600"
        runs = [self.start("send", sid, text, PYTHONIOENCODING="cp1252"),
                self.start("send", sid, text, PYTHONIOENCODING="ascii", LC_ALL="C"),
                self.start("send", sid, "-", PYTHONIOENCODING="ascii", stdin=subprocess.PIPE),
                self.start("send", sid, "-", PYTHONIOENCODING="cp1252", stdin=subprocess.PIPE)]
        for process in runs:
            out, err = process.communicate(text.encode() if process.stdin else None, timeout=60)
            self.assertEqual(process.returncode, 0, err)
        out, err = self.start("poll", sid, PYTHONIOENCODING="cp1252").communicate(timeout=60)
        self.assertEqual([row["text"] for row in json.loads(out.decode("utf-8"))["messages"]],
                         [text] * 4)

    @unittest.skipUnless(os.name == "posix", "arguments are text on Windows")
    def test_input_that_is_no_text_is_refused_with_a_sentence(self):
        sid = self.opened()
        for process in (self.start("send", sid, b"\xff"),
                        self.start("tx", "send", "c", b"\xff", "--json"),
                        self.start("send", sid, "-", stdin=subprocess.PIPE)):
            out, err = process.communicate(b"\xff\xfe" if process.stdin else None, timeout=60)
            self.assertNotIn(b"Traceback", err)
            self.assertIn(process.returncode, (1, 2))
            self.assertIn("UTF-8", json.loads(out.decode())["message"])

    def test_send_imports_only_what_it_needs(self):
        sid = self.opened()
        done = subprocess.run(      # -S: what site loads for this machine is not ours
            [sys.executable, "-S", "-X", "importtime", NEXUS, "send", sid, "hi"], timeout=60,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(self.home))
        self.assertEqual(done.returncode, 0, done.stderr)
        loaded = set(re.findall(r"(?m)^import time:.*\| +(\S+)$", done.stderr.decode()))
        self.assertIn("json", loaded)
        self.assertEqual(loaded & {
            "sqlite3", "ssl", "http", "http.client", "http.server", "hashlib", "asyncio", "email",
            "urllib.request", "subprocess", "tempfile", "secrets", "random", "logging"}, set())


# ----------------------------------------------------------------------------------------
# Parcels
#
# Three sites that never see each other; what goes between them are files. Whatever is cut, killed,
# read twice or sent around, each message is everywhere once, in its order.
# ----------------------------------------------------------------------------------------


class Parcels(Case):
    """tx export, tx import, keygen."""

    def setUp(self):
        self.home = self.folder()
        self.sites = {name: self.server(site=name) for name in ("lab", "field", "home")}
        self.clients = {name: server.client().messages for name, server in self.sites.items()}
        self.files = 0

    def run_at(self, site, *words, code=0):
        """A `tx` verb at a site; what it printed as JSON, or the refusal."""
        ran = run_here(self.home, "tx", *words, "--json", url=self.sites[site].url)
        self.assertEqual(ran.code, code, ran)
        return ran.json

    def path(self, name):
        return os.path.join(self.home, name)

    def export(self, site, to, *flags):
        """A parcel from a site: its path, or None where nothing is new."""
        self.files += 1
        path = self.path("%d.parcel%s" % (self.files, ".gz" * (self.files % 2)))
        self.run_at(site, "export", path, "--to", to, *flags)
        return path if os.path.exists(path) else None

    def take(self, site, path, *flags):
        """(imported, already here, over, acked) of an import."""
        found = self.run_at(site, "import", path, *flags)
        return tuple(found[name] for name in ("imported", "alreadyHere", "over", "acked"))

    def contents(self, site, channel="c"):
        return [row["content"] for row in self.clients[site].inbox(channel)]

    def send(self, site, *texts, **values):
        return [self.clients[site].send("c", text, **values)["id"] for text in texts]

    def lines(self, path):
        opened = nexus.gzip.open if path.endswith(".gz") else open
        with opened(path, "rb") as file:
            return file.read().splitlines(True)

    def forge(self, path, *lines):
        """Write a parcel with these lines, and a seal that fits."""
        data = "".join(line + "\n" for line in lines).encode()
        with open(path, "wb") as file:
            file.write(data + b'{"seal":{"sha256":"%s"}}\n'
                       % hashlib.sha256(data).hexdigest().encode())

    def test_it_can_be_read_by_eye_and_checked_by_hand(self):
        sent = self.clients["lab"].send("c", "with " + TOKEN, "ada", "t1", 60, "corr", {"a": 1})
        path = self.export("lab", "field")
        head, message, seal = [json.loads(line.decode()) for line in self.lines(path)]
        site = self.sites["lab"].store.parcels.site()
        self.assertRegex(site["id"], "^[0-9a-f]{16}$")
        self.assertEqual(dict(head, createdAt=""), {
            "nexusParcel": 1, "site": {"id": site["id"], "name": "lab"}, "to": "field", "parcel": 1,
            "previous": None, "createdAt": "", "channels": None, "messages": 1, "acks": 0})
        self.assertEqual(message, {"message": dict(sent, origin={"site": site["id"], "id": 1})})
        made = hashlib.sha256(b"".join(self.lines(path)[:-1])).hexdigest()
        self.assertEqual(seal, {"seal": {"sha256": made}})
        self.assertEqual(self.take("field", path), (1, 0, 0, 0))
        row, = self.clients["field"].inbox("c")
        self.assertEqual(dict(row, id=1), {name: value for name, value in message[
            "message"].items() if name != "redacted"})      # the text holds no secret any more
        self.assertIsNone(self.export("lab", "field"))          # nothing is new: no file
        self.assertEqual(list(self.clients["lab"].inbox("c")[0]), list(FIELDS) + ["redacted"])

    def test_twice_after_gc_and_over_and_in_order(self):
        self.send("field", "own")
        self.send("lab", "1", "2")
        self.send("lab", "short", ttl_seconds=5)
        self.send("lab", "3")
        path = self.export("lab", "field")
        self.sites["field"].clock.advance(6)
        self.assertEqual(self.take("field", path, "--dry-run"), (3, 0, 1, 0))
        self.assertEqual(self.take("field", path), (3, 0, 1, 0))
        self.assertEqual(self.sites["field"].store.channels.sent, 4)
        self.assertEqual(self.contents("field"), ["own", "1", "2", "3"])
        self.assertEqual(self.take("field", path), (0, 3, 1, 0))
        self.clients["field"].ack_all("c")
        self.clients["field"].gc(0)
        self.assertEqual(self.take("field", path), (0, 3, 1, 0))
        self.assertEqual(self.contents("field"), [])
        self.assertIsNone(self.export("field", "home"))         # what is done goes nowhere

    def test_what_came_and_is_gone_is_remembered_in_few_rows(self):
        store, pick, everything = self.sites["field"].store, random.Random(3), range(1, 121)
        self.send("lab", *map(str, everything))
        path = self.export("lab", "field")
        self.take("field", path)
        left, rows = list(everything), lambda: store.db.read(
            "SELECT first, last FROM gone ORDER BY last")
        pick.shuffle(left)
        while left:
            some = sorted(left.pop() for _ in range(min(len(left), pick.randrange(1, 9))))
            store.db.write(lambda db: store.channels._remove(db, some))
            kept = {number for first, last in rows() for number in range(first, last + 1)}
            self.assertEqual(kept, set(everything) - set(left))
            self.assertTrue(all(low[1] + 1 < high[0] for low, high in zip(rows(), rows()[1:])))
            self.assertEqual(store.db.read("SELECT COUNT(*) FROM arrivals"), [(len(left),)])
            if len(left) % 3 == 0:
                self.assertEqual(self.take("field", path), (0, 120, 0, 0))
        self.assertEqual(rows(), [(1, 120)])
        self.assertEqual(self.take("field", path), (0, 120, 0, 0))

    def test_who_waits_is_woken_by_what_comes_in(self):
        self.send("lab", "hello")
        path = self.export("lab", "field")
        waiting = Started(self.clients["field"].inbox, "c", wait=30)
        until(lambda: self.sites["field"].store.waiters.parked)
        self.take("field", path)
        self.assertEqual(waiting.result()[0]["content"], "hello")

    def test_acks_go_home_the_way_the_message_came(self):
        first, second = self.send("lab", "1", "2")
        self.take("field", self.export("lab", "field"))
        self.take("home", self.export("field", "home"))
        self.assertIsNone(self.export("home", "field"))         # it came from there
        self.assertIsNone(self.export("home", "lab"))           # it began there
        self.clients["home"].ack(1)
        self.clients["home"].gc(0)                              # the ack stays known
        self.assertEqual(self.take("field", self.export("home", "field")), (0, 0, 0, 1))
        self.assertIsNone(self.export("home", "field"))
        back = self.export("field", "lab")
        self.assertEqual(self.take("lab", back), (0, 0, 0, 1))
        self.assertEqual(self.take("lab", back), (0, 0, 0, 0))
        self.assertEqual(self.contents("lab"), ["2"])
        self.assertEqual(self.clients["lab"].inbox("c", include_acked=True)[0]["status"], "acked")
        self.assertEqual(self.clients["field"].pending("c"), 1)
        self.clients["field"].lease("c", "worker")              # work under way is done by it, too
        self.clients["lab"].ack(second)
        self.assertIsNone(self.export("field", "lab"))

    def test_in_a_ring_acks_go_home_and_messages_do_not(self):
        self.send("lab", "1")
        self.take("field", self.export("lab", "field"))
        self.take("home", self.export("field", "home"))
        self.assertIsNone(self.export("home", "lab"))           # home and lab have never met
        self.clients["home"].ack(1)
        self.sites["lab"].clock.advance(3600)
        path = self.export("home", "lab")
        ack = json.loads(self.lines(path)[1].decode())["ack"]
        self.assertEqual(self.take("lab", path), (0, 0, 0, 1))
        row, = self.clients["lab"].inbox("c", include_acked=True)
        self.assertEqual(row["ackedAt"], ack["ackedAt"])        # when it was, not when it came
        self.sites["lab"].settings.site = "attic"               # a new name goes around, too
        self.send("lab", "2")
        self.take("field", self.export("lab", "field"))
        self.take("home", self.export("field", "home"))
        self.assertEqual(self.run_at("home", "export", "-", "--to", "attic", "--dry-run")[
            "messages"], 0)
        self.take("home", self.export("lab", "home"))           # its own word goes before others'
        self.sites["lab"].settings.site = "cellar"
        self.send("lab", "3")
        self.take("field", self.export("lab", "field"))
        self.take("home", self.export("field", "home"))
        self.assertEqual(self.sites["home"].store.parcels.known()[
            self.sites["lab"].store.parcels.site()["id"]], "attic")

    def test_a_message_may_be_as_long_as_a_body(self):
        for length in (400000, 1000000, 1048500):
            self.clients["lab"].send("c", "x" * length)
        self.assertEqual(self.take("field", self.export("lab", "field")), (3, 0, 0, 0))

    def test_a_thousand_channels_exported_each_alone(self):
        server = self.sites["lab"]
        self.send("lab", "old", "new")
        server.store.db.write(lambda db: db.execute(
            "INSERT INTO parcels VALUES ('field', 1, NULL, ?, 1, 0, 0, NULL, 'x', NULL)", (
                nexus.to_json(dict({"c%d" % number: 1 for number in range(1100)},
                                   **{"": 0, "c": 1})),)))
        server.store.db.write(lambda db: db.execute("UPDATE parcels SET chosen = '[\"d\"]'"))
        path = self.export("lab", "field")
        self.assertEqual([json.loads(line.decode())["message"]["content"]
                          for line in self.lines(path)[1:-1]], ["new"])

    def test_a_ring_in_which_sticks_are_lost_late_and_read_twice(self):
        pick, ring = random.Random(11), ("lab", "field", "home")
        sent, sticks = [], {name: [] for name in ring}
        with patched(nexus, "PARCEL_ROWS", 3):
            for step in range(40):
                place = pick.randrange(3)
                site, to = ring[place], ring[(place + 1) % 3]
                for _ in range(pick.randrange(4)):
                    sent.append("%s %d" % (site, len(sent)))
                    self.send(site, sent[-1])
                path = self.export(site, to)
                if path:
                    sticks[to].append(path)
                for path in sticks[to] if pick.random() < 0.7 else ():
                    if pick.random() < 0.4:                     # killed in the middle
                        real, left = nexus.Messages.import_parcel, iter([1])

                        def dies(*args, **values):
                            return real(*args, **values) if next(left, 0) else self.fail("killed")
                        with patched(nexus.Messages, "import_parcel", dies), \
                                contextlib.suppress(AssertionError):
                            self.take(to, path)
                    self.take(to, path)
            for _ in range(3):                                  # until everything went around
                for place, site in enumerate(ring):
                    path, to = self.export(site, ring[(place + 1) % 3]), ring[(place + 1) % 3]
                    for each in sticks[to] + [path] * bool(path):
                        self.take(to, each)
        for site in ring:
            found = [row["content"] for row in self.clients[site].inbox("c", limit=1000)]
            self.assertEqual(sorted(found), sorted(sent))
            for begin in ring:                                  # each site's in their order
                self.assertEqual([text for text in found if text.startswith(begin)],
                                 [text for text in sent if text.startswith(begin)])

    def test_of_two_exports_at_a_time_one_ends(self):
        for channel in "abc":
            self.clients["lab"].send(channel, channel)
        real, path = nexus.Messages.parcel_rows, self.path("first")

        def other(*args, **values):                             # begins while the first one reads
            with patched(nexus.Messages, "parcel_rows", real):
                self.second = self.second or self.export("lab", "field", "--channel", "a")
            return real(*args, **values)
        self.second = None
        with patched(nexus.Messages, "parcel_rows", other):
            found = self.run_at("lab", "export", path, "--to", "field", code=1)
        self.assertEqual(found["error"], "parcel_taken")
        self.assertEqual(self.take("field", self.second), (1, 0, 0, 0))
        seal = nexus.Messages.seal_parcel

        def late(*args):                                        # it begins after the last row
            with patched(nexus.Messages, "seal_parcel", seal):
                self.third = self.export("lab", "field", "--channel", "b")
            return seal(*args)
        with patched(nexus.Messages, "seal_parcel", late):
            found = self.run_at("lab", "export", path, "--to", "field", code=1)
        self.assertEqual(found["error"], "parcel_taken")
        self.assertFalse(os.path.exists(path))
        self.assertEqual(self.take("field", self.third), (1, 0, 0, 0))
        self.assertEqual(self.take("field", self.export("lab", "field")), (1, 0, 0, 0))

    def test_an_export_that_was_killed_before_its_seal_is_opened_again(self):
        self.send("lab", "1")
        with patched(nexus.Messages, "seal_parcel", lambda *_: self.fail("killed")), \
                self.assertRaises(AssertionError):
            self.export("lab", "field")
        killed = self.path("%d.parcel.gz" % self.files)
        self.send("lab", "2")
        path = self.export("lab", "field")
        self.assertEqual([json.loads(self.lines(each)[0].decode())["parcel"]
                          for each in (killed, path)], [1, 1])
        for each, counts in ((killed, (1, 0, 0, 0)), (path, (1, 1, 0, 0))):
            self.assertEqual(self.take("field", each), counts)
        self.send("lab", "3")
        self.assertEqual(self.take("field", self.export("lab", "field")), (1, 0, 0, 0))
        self.assertEqual(self.contents("field"), ["1", "2", "3"])

    def test_a_stick_that_is_full_leaves_no_half_and_nothing_counts_as_sent(self):
        self.send("lab", "1")
        full = OSError(nexus.errno.ENOSPC, "No space left on device")
        for place, name in ((nexus.os, "fsync"), (nexus, "spool_parcel")):
            with patched(place, name, functools.partial(throw, full)):
                found = self.run_at("lab", "export", self.path("full"), "--to", "field", code=1)
            self.assertEqual(found["error"], "export_failed")
            self.assertIn("No space left", found["message"])
        self.assertEqual([name for name in os.listdir(self.home) if "full" in name], [])
        self.assertEqual(self.take("field", self.export("lab", "field")), (1, 0, 0, 0))

    def test_a_missing_parcel_is_said_and_one_can_be_written_again(self):
        paths = []
        for text in "1234":
            self.send("lab", text)
            paths.append(self.export("lab", "field"))
        self.take("field", paths[0])
        for path, missing in ((paths[2], "Parcel 2 from lab"), (paths[3], "Parcel 2 to 3 from")):
            found = self.run_at("field", "import", path, code=1)
            self.assertEqual(found["error"], "parcel_missing")
            self.assertIn(missing, found["message"])
            self.assertIn("--accept-gap", found["message"])
        self.assertEqual(self.contents("field"), ["1"])
        again = self.export("lab", "field", "--again", "2")
        self.assertNotEqual(self.lines(again), self.lines(paths[1]))    # made at another time
        self.assertEqual(self.take("field", again), (1, 0, 0, 0))
        self.assertEqual(self.take("field", paths[2]), (1, 0, 0, 0))    # it names the first seal
        self.assertEqual(self.take("field", paths[1]), (0, 1, 0, 0))
        self.send("lab", "5")
        late = self.export("lab", "field")
        self.assertEqual(self.take("field", late, "--accept-gap"), (1, 0, 0, 0))
        self.assertEqual(self.take("field", paths[3]), (1, 0, 0, 0))    # late, and not lost
        self.assertEqual(self.run_at("lab", "export", self.path("x"), "--to", "field", "--again",
                                     "9", code=1)["error"], "parcel_not_found")

    def test_chosen_channels_go_alone_and_the_others_later(self):
        for channel in ("a", "b", "a", "d"):
            self.clients["lab"].send(channel, channel)
        first = self.export("lab", "field", "--channel", "a", "--channel", "d")
        self.assertEqual(json.loads(self.lines(first)[0].decode())["channels"], ["a", "d"])
        self.clients["lab"].send("a", "later")
        rest = self.export("lab", "field")
        self.assertEqual([self.take("field", path) for path in (first, rest)],
                         [(3, 0, 0, 0), (2, 0, 0, 0)])
        self.assertEqual([self.contents("field", channel) for channel in "abd"],
                         [["a", "a", "later"], ["b"], ["d"]])
        self.assertIsNone(self.export("lab", "field"))

    def test_keys_seal_and_are_private(self):
        key, other, short = self.path("k"), self.path("other"), self.path("short")
        for path in (key, other):
            self.assertEqual(run_here(self.home, "keygen", path).code, 0)
            self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        self.assertEqual(run_here(self.home, "keygen", key).json["error"], "no_key")
        with open(short, "w") as file:
            file.write("too short")
        self.send("lab", "1")
        path, plain = self.export("lab", "field", "--key-file", key), self.export("lab", "home")
        for site, flags, error, told in (
                ("field", [], "broken_parcel", "--key-file"),
                ("field", ["--key-file", other], "broken_parcel", "another key"),
                ("field", ["--key-file", short], "bad_key", "keygen"),
                ("field", ["--key-file", self.path("none")], "bad_key", "none")):
            found = self.run_at(site, "import", path, *flags, code=1)
            self.assertEqual(found["error"], error)
            self.assertIn(told, found["message"])
        os.chmod(other, 0o644)
        if os.name == "posix":
            self.assertIn("chmod 600", self.run_at("field", "import", path, "--key-file", other,
                                                   code=1)["message"])
        self.assertIn("without", self.run_at("home", "import", plain, "--key-file", key,
                                             code=1)["message"])
        self.assertEqual(self.take("field", path, "--key-file", key), (1, 0, 0, 0))

    def test_what_is_broken_or_strange_is_refused_whole(self):
        self.send("lab", *"12345")
        self.export("lab", "field", "--dry-run")
        path = self.path("good")
        self.run_at("lab", "export", path, "--to", "field")
        with open(path, "rb") as file:
            good = file.read()
        lines, cases = good.splitlines(True), []
        pick = random.Random(5)
        for _ in range(60):
            place = pick.randrange(len(good))
            cases.append((good[:place] + bytes([good[place] ^ 1 << pick.randrange(8)])
                          + good[place + 1:], ""))
        packed = nexus.gzip.compress(good)
        cases += [(good[:length], "") for length in (0, 5, 300, len(good) - 1)]
        cases += [
            (b"".join(lines[:3] + lines[4:]), "changed"), (b"".join(lines[:-1]), "seal is missing"),
            (good + lines[1], "goes on"), (good.replace(b'Parcel":1', b'Parcel":2'), "newer"),
            (b"hello\n", "no parcel"), (b"[1]\n", "no parcel"), (packed[:-9], "cut short"),
            (nexus.gzip.compress(b"x" * 9000000), "more than 4194304 bytes in line 1"),
            (lines[0] + b"x" * 5000000, "more than"), (packed[:40] + b"??" + packed[42:], "")]
        for data, told in cases:
            with open(path, "wb") as file:
                file.write(data)
            found = self.run_at("field", "import", path, code=1)
            self.assertEqual(found["error"], "broken_parcel", found)
            self.assertIn(told, found["message"])
            self.assertIn("Nothing was imported", found["message"])
        head, message = [json.loads(line.decode()) for line in lines[:2]]
        for changes, row in (
                ({"site": "x"}, None), ({"site": {"id": 5}}, None), ({"to": 5}, None),
                ({"parcel": 0}, None), ({"previous": 5}, None), ({"replaces": "x"}, None),
                ({"sites": {"x": "y"}}, None), ({}, {"message": 5}), ({}, {"ack": {"site": "x"}}),
                ({}, {"message": dict(message["message"], content="")}),
                ({}, {"message": dict(message["message"], createdAt="2026-13-01T00:00:00.000Z")}),
                ({}, {"message": dict(message["message"], origin={"site": "x", "id": 1})})):
            rows = [dict(head, messages=4 + int(row is None or "message" in row),
                         acks=int(row is not None and "ack" in row), **changes)] + [
                json.loads(line.decode()) for line in lines[1:5]] + [row or message]
            self.forge(path, *map(nexus.to_json, rows))
            found = self.run_at("field", "import", path, code=1)
            self.assertEqual(found["error"], "broken_parcel", found)
            self.assertIn("is no parcel of nexus: ", found["message"])
        self.assertEqual(self.clients["field"].channels(), [])
        with open(path, "wb") as file:
            file.write(good)
        for site, told in (("home", "is for field, this server is home"), ("lab", "is for field")):
            found = self.run_at(site, "import", path, code=1)
            self.assertEqual(found["error"], "parcel_elsewhere")
            self.assertIn(told, found["message"])
        self.assertEqual(self.run_at("lab", "export", path, "--to", "x", code=1)["error"],
                         "file_exists")
        self.assertEqual(self.run_at("lab", "import", self.path("no"), code=1)["error"],
                         "no_parcel")

    def test_a_channel_that_is_full_stops_it_and_a_repetition_ends_it(self):
        self.send("lab", *"12345")
        path = self.export("lab", "tight")
        server = self.server(site="tight", max_channel_messages=3)
        self.sites["tight"], self.clients["tight"] = server, server.client(
            patience=-1).messages
        with patched(nexus, "PARCEL_ROWS", 2), patched(nexus, "CLIENT_ATTEMPTS", 1):
            found = run_here(self.home, "tx", "import", path, url=server.url)
            self.assertEqual(found.code, 1)
            self.assertRegex(found.err, "full.*Channel c.* 2 message.* the same command takes")
            self.assertEqual(self.contents("tight"), ["1", "2"])
            self.clients["tight"].ack_all("c")
            self.clients["tight"].gc(0)
            self.assertEqual(self.take("tight", path), (3, 2, 0, 0))

    def test_secrets_are_blacked_out_at_the_door(self):
        self.send("lab", "nothing secret here, I say")
        path = self.path("p")
        self.run_at("lab", "export", path, "--to", "field")
        *rows, _ = self.lines(path)
        self.forge(path, *[row.decode().strip().replace("nothing secret here, I say", TOKEN)
                           for row in rows])
        self.take("field", path)
        row, = self.clients["field"].inbox("c")
        self.assertNotIn(TOKEN, row["content"])
        self.assertTrue(row["redacted"])

    def test_a_restored_database_gives_no_id_twice(self):
        folder = self.folder()
        database, copy = os.path.join(folder, "a.db"), os.path.join(folder, "copy.db")
        server = self.server(db=database, site="lab")
        server.client().messages.send("c", "before")
        self.assertEqual(run_here(folder, "backup", copy, "--db", database).code, 0)
        last = server.client().messages.send("c", "lost")["id"]
        server.stop()
        self.assertEqual(run_here(folder, "restore", copy, "--db", database).code, 0)
        server = self.server(db=database)
        self.assertGreater(server.client().messages.send("c", "after")["id"], last)


def throw(trouble, *_):
    """Raise it."""
    raise trouble


# ----------------------------------------------------------------------------------------
# Pages
#
# A real browser (chromium with chromedriver, over plain WebDriver HTTP), where there is one: people
# and agents in one conversation, strangers' messages, servers that go and come, and no complaint of
# the browser about any of it. Everything is waited for; nothing is slept for.
# ----------------------------------------------------------------------------------------


BROWSER = os.environ.get("NEXUS_TEST_BROWSER") != "0" and shutil.which("chromedriver") \
    and (shutil.which("chromium") or shutil.which("google-chrome"))


class Browser:
    """A real Chromium, driven over plain WebDriver HTTP: one session of a driver of its own."""

    KEY = "element-6066-11e4-a52e-4f735466cecf"     # how WebDriver names an element

    def __init__(self, case, dark=False, width=1280, height=800):
        for _ in range(5):      # it takes the same port twice, for IPv4 too, and may be too late
            self._driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE,
                                            stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
            line = next((line for line in iter(self._driver.stdout.readline, b"")
                         if b"successfully on port" in line), None)
            if line:
                break
            self._driver.stdout.close()
            self._driver.wait(20)
        case.assertTrue(line, "chromedriver did not start")
        case.addCleanup(self._end)
        self._port, self._session = int(re.search(rb"port (\d+)", line)[1]), ""
        self._profile = case.folder()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--window-size=%d,%d" % (width, height), "--user-data-dir=" + self._profile,
                 "--disable-background-networking", "--no-first-run"]
        flags += ["--blink-settings=preferredColorScheme=0"] * dark
        found = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": {
            "goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}}})
        self._session = "/session/" + found["sessionId"]
        self.ask("POST", "/window/rect", {"width": width, "height": height})

    def _end(self):
        with contextlib.suppress(OSError, AssertionError):
            self.ask("DELETE", "")
        self._driver.terminate()
        self._driver.wait(20)
        self._driver.stdout.close()

    def ask(self, method, path, body=None):
        """One call of the driver; returns its value."""
        wire = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        with contextlib.closing(wire):
            wire.request(method, self._session + path, None if body is None and method != "POST"
                         else json.dumps(body or {}), {"Content-Type": "application/json"})
            answer = wire.getresponse()
            value = json.loads(answer.read().decode())["value"]
        if answer.status >= 400:
            raise AssertionError("%s %s: %s" % (method, path, value.get("message", value)[:300]))
        return value

    def open(self, url):
        self.ask("POST", "/url", {"url": url})

    def run(self, script, *args):
        """What a script returns."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def until(self, script, seconds=30):
        """Wait until a script returns something true, and return that."""
        found = []
        try:
            until(lambda: found.append(self.run("return " + script)) or found[-1], seconds)
        except AssertionError:
            raise AssertionError("never true: %s; the page: %s" % (script, self.run(
                "return document.body.innerText").strip()[:600])) from None
        return found[-1]

    def find(self, selector):
        return "/element/" + self.ask("POST", "/element", {
            "using": "css selector", "value": selector})[self.KEY]

    def type(self, selector, text):
        """Keys into an element; \\n is Enter."""
        self.ask("POST", self.find(selector) + "/value", {"text": text.replace("\n", "\ue007")})

    def click(self, selector):
        self.ask("POST", self.find(selector) + "/click")

    def picture(self, path):
        with open(path, "wb") as file:
            file.write(base64.b64decode(self.ask("GET", "/screenshot")))

    def complaints(self):
        """What the browser's console says against the page, but for answers of 400 and more."""
        return [row["message"] for row in self.ask("POST", "/se/log", {"type": "browser"})
                if row["level"] == "SEVERE" and "Failed to load resource" not in row["message"]
                and "ERR_CONNECTION" not in row["message"]]

    def texts(self):
        """The texts in the log, in order."""
        return self.run("return [...document.querySelectorAll('#log .message > p')]"
                        ".map(p => p.textContent)")



EVIL = ["<img src=x onerror='window.hacked=1'>", "</script><script>window.hacked=1</script>",
        "<a href=\"javascript:window.hacked=1\">x</a>", "\u202e gnp.exe",
        "&lt;b&gt; ${window.hacked=1}",
        "a\nb\n\n  c"]


@unittest.skipUnless(BROWSER, "chromium and chromedriver are not both here, or were told to rest")
class Pages(Case):
    """The pages as people meet them."""

    def setUp(self):
        self.s, self.home = self.server(clock=nexus.Clock()), self.folder()
        self.client = self.s.client()

    def met(self, greeting="Welcome"):
        """(session id, ada's key): ada is a command-line agent in a session of her own."""
        made = self.client.create(creator_agent_id="ada", greeting=greeting)
        nexus.State(self.home).remember(made["sessionId"], self.s.url, "ada", made["sessionKey"])
        return made["sessionId"], made["sessionKey"]

    def joined(self, browser, sid, name):
        """A person joins from the link, and reads what there is."""
        browser.open(self.client.pair(sid)["url"])
        browser.type("#name", name + "\n")
        browser.until("document.querySelector('#state').dataset.state == 'connected'")
        browser.until("document.querySelectorAll('#log .message').length")

    def send(self, sid, text, **values):
        self.client.send(sid, "ada", text, session_key=nexus.State(self.home).get(sid, "key"),
                         **values)

    def test_people_and_an_agent_talk_reload_and_lose_nothing(self):
        sid, key = self.met()
        link = self.client.pair(sid)["url"]
        one, two = Browser(self), Browser(self, width=390, height=844)
        one.open(link)
        self.assertIn("ada is in it", one.run("return document.body.innerText"))
        one.until("/^(9 minutes|10 minutes) left$/.test(document.querySelector('#codeEnds')"
                  ".textContent)")
        self.assertEqual(self.client.pair_status(link)["state"], "pending")     # a look claims none
        one.type("#name", "a b\n")
        self.assertTrue(one.run("return !document.querySelector('#name').checkValidity()"))
        one.run("document.querySelector('#name').value = ''")
        one.type("#name", "ada\n")
        one.until("document.querySelector('#joinNotice').textContent.includes('already')")
        one.run("document.querySelector('#name').value = ''")
        one.type("#name", "eve\n")
        one.until("document.querySelectorAll('#log .message').length == 1")
        self.assertEqual(one.run("return location.pathname + location.hash"), "/talk")
        self.assertEqual(self.client.pair_status(link)["state"], "claimed")
        opened = run_here(self.home, "open", sid).json["url"]       # ada's human takes over
        two.open(opened)
        two.until("document.querySelector('#who').textContent == 'ada'")
        self.assertEqual(two.run("return location.href"), self.s.url + "/talk")
        one.type("#text", "Hello from a phone\n")
        two.until("document.querySelectorAll('#log .message').length == 2")
        self.send(sid, "with password=" + "hunter2" + "xyz", json={"page": [1, 2]})
        for browser in (one, two):
            browser.until("document.querySelectorAll('#log .message').length == 3")
            self.assertEqual(browser.texts(), ["Welcome", "Hello from a phone",
                                               "with password=password removed"])
        self.assertIn('"page"', one.run("return document.querySelector('#log details').innerText"))
        self.assertEqual(two.run("return document.querySelectorAll('.mine').length"), 1)
        found = self.client.poll(sid, "ada")["messages"]
        self.assertEqual((found[1]["text"], found[1]["verified"]), ("Hello from a phone", True))
        one.type("#text", "half a thou")
        one.ask("POST", "/refresh")
        one.until("document.querySelectorAll('#log .message').length == 3")
        self.assertEqual(one.run("return document.querySelector('#text').value"), "half a thou")
        one.type("#text", "ght\n")
        two.until("document.querySelectorAll('#log .message').length == 4")
        one.until("document.querySelectorAll('#log .message').length == 4")
        self.assertEqual(one.texts()[3], "half a thought")
        one.run("document.querySelector('.wire').open = true")
        wire = one.run("return document.querySelector('#calls').textContent")
        self.assertIn('curl -sS -X POST', wire)
        self.assertIn("$NEXUS_KEY", wire)
        for browser in (one, two):
            self.assertEqual(browser.complaints(), [])
            self.assertNotIn(key, browser.run("return document.documentElement.outerHTML"))
        one.click("#leave")
        one.click("#panel button")
        one.until("document.querySelector('#state').textContent == 'You have left.'")
        self.assertEqual(self.client.status(sid)["agents"], ["ada"])

    def test_what_strangers_write_is_text(self):
        sid, _ = self.met(EVIL[0])
        browser = Browser(self)
        self.joined(browser, sid, "eve")
        for text in EVIL[1:]:
            self.send(sid, text, json={text: [text]})
        browser.until("document.querySelectorAll('#log .message').length == %d" % len(EVIL))
        self.assertEqual(browser.texts(), EVIL)
        self.assertIsNone(browser.run("return window.hacked"))
        self.assertEqual(browser.run("return document.querySelectorAll('#log img, #log script,"
                                     " #log a').length"), 0)
        self.assertEqual(browser.complaints(), [])

    def test_a_server_that_is_killed_and_comes_back_costs_no_message(self):
        folder = self.folder()
        process = self.process(folder=folder)
        client = nexus.Client(process.url)
        made = client.create(creator_agent_id="ada", greeting="Hi")
        browser = Browser(self)
        browser.open(client.pair(made["sessionId"])["url"])
        browser.type("#name", "eve\n")
        browser.until("document.querySelectorAll('#log .message').length == 1")
        process.stop(signal.SIGKILL)
        browser.type("#text", "said while it was away\n")
        browser.until("document.querySelector('#state').textContent.startsWith('trying again in')")
        browser.until("document.querySelector('#outbox').textContent.includes('said while')")
        browser.ask("POST", "/url", {"url": "about:blank"})     # the page is closed meanwhile, too
        process = Process(folder, "--port", str(process.port))
        self.addCleanup(process.stop, signal.SIGKILL)
        client = nexus.Client(process.url)
        client.send(made["sessionId"], "ada", "back", session_key=made["sessionKey"])
        browser.open(process.url + "/talk")
        browser.until("document.querySelectorAll('#log .message').length == 3")
        self.assertEqual(sorted(browser.texts()), ["Hi", "back", "said while it was away"])
        self.assertEqual(len(client.poll(made["sessionId"], "ada")["messages"]), 3)

    def test_eight_tabs_share_one_poll_and_each_hears(self):
        sid, _ = self.met()
        browser = Browser(self)
        self.joined(browser, sid, "eve")
        tabs = [browser.ask("GET", "/window")]
        for _ in range(7):
            tabs.append(browser.ask("POST", "/window/new", {"type": "tab"})["handle"])
            browser.ask("POST", "/window", {"handle": tabs[-1]})
            browser.open(self.s.url + "/talk")
            browser.until("document.querySelector('#known button') || document.querySelectorAll("
                          "'#log .message').length")
            if browser.run("return !!document.querySelector('#known button')"):
                browser.click("#known button")
            browser.until("document.querySelectorAll('#log .message').length == 1")
        self.send(sid, "to all of you")
        for handle in tabs:
            browser.ask("POST", "/window", {"handle": handle})
            browser.until("document.querySelectorAll('#log .message').length == 2")
        self.assertLessEqual(self.s.store.waiters.parked, 1)

    def test_who_scrolled_up_stays_among_5000_messages(self):
        sid, _ = self.met()
        for number in range(20):
            self.send(sid, "line %d" % number)
        with contextlib.closing(sqlite3.connect(":memory:")):
            place, = self.s.store.db.read("SELECT MAX(place) FROM session_messages")[0]

        def fill(db):
            db.executemany("INSERT INTO session_messages (place, id, agent_id, text, verified,"
                           " created_at, expires_at, size) VALUES (?, ?, 'ada', ?, 1, ?, ?, 4)",
                           [(place + at, "msg_%d" % at, "line %d\n%s" % (at, "words " * (at % 40)),
                             self.s.clock.now(), self.s.clock.now() + 3600000)
                            for at in range(1, 4981)])
            db.execute("UPDATE sessions SET last_cursor = last_cursor + 4980,"
                       " messages = messages + 4980")
        self.s.store.db.write(fill)
        browser = Browser(self)
        self.joined(browser, sid, "eve")
        browser.until("document.querySelectorAll('#log .message').length == 5001")
        last = "document.querySelector('#lines').lastChild.getBoundingClientRect()"
        browser.until(last + ".bottom <= document.querySelector('#log').getBoundingClientRect()"
                      ".bottom + 2")
        browser.run("document.querySelector('#log').scrollTop = -9000")
        seen = browser.until("window.seen = [...document.querySelectorAll('.message')].find("
                             "each => each.getBoundingClientRect().top > 200)?.dataset.cursor")
        place = "document.querySelector('[data-cursor=\"%s\"]').getBoundingClientRect().top" % seen
        browser.until("window.place === %s || void (window.place = %s)" % (place, place))
        self.send(sid, "one more")
        browser.until("document.querySelector('#below').textContent == '1 new below'")
        self.assertLess(abs(browser.run("return %s - window.place" % place)), 20)
        browser.click("#below")
        browser.until("document.querySelector('#below').hidden")

    def test_spectators_read_along_until_the_link_is_withdrawn(self):
        sid, key = self.met("Hello")
        link = run_here(self.home, "watch-link", sid).json["url"]
        browser = Browser(self)
        browser.open(link)
        browser.until("document.querySelectorAll('#log .message').length == 1")
        before = self.client.status(sid)
        self.send(sid, "second")
        browser.until("document.querySelectorAll('#log .message').length == 2")
        self.assertEqual(browser.run("return location.href"), self.s.url + "/w")
        shown = browser.run("return document.documentElement.outerHTML")
        for hidden in (sid, key, link.partition("#")[2]):
            self.assertNotIn(hidden, shown)
        self.assertEqual(before["agents"], ["ada"])
        browser.ask("POST", "/refresh")
        browser.until("document.querySelectorAll('#log .message').length == 2")
        self.assertEqual(run_here(self.home, "watch-link", sid, "--stop").json["withdrawn"], 1)
        browser.until("document.querySelector('#state').dataset.state == 'ended'")
        self.assertEqual(browser.complaints(), [])

    def test_the_overview_wants_the_token_and_works(self):
        token = "t0ken-" + "of-the-server"
        server = self.server(token=token, max_attempts=1, clock=nexus.Clock())
        messages = server.client(token=token).messages
        messages.send("jobs", "resize picture 1", "ada")
        browser = Browser(self)
        browser.open(server.url + "/watch")
        browser.until("!document.querySelector('#ask').hidden")
        browser.type("#token", "wrong\n")
        browser.until("document.querySelector('#askNotice').textContent")
        browser.run("document.querySelector('#token').value = ''")
        browser.type("#token", token + "\n")
        browser.until("document.querySelectorAll('#channels tr').length == 1")
        browser.click("#channels button")
        browser.until("document.querySelectorAll('#log .message').length == 1")
        browser.type("#content", "and picture 2")
        browser.click("#send button")
        browser.until("document.querySelectorAll('#log .message').length == 2")
        browser.type("#log .message:first-child input", "done\n")
        until(lambda: messages.pending("jobs") == 1, 30)
        browser.click("#log .message:last-child form button[type=button]")
        until(lambda: messages.pending("jobs") == 0, 30)
        self.assertEqual(messages.inbox("ada")[0]["content"], "done")
        self.assertEqual(browser.complaints(), [])
        self.assertNotIn(token, browser.run("return document.documentElement.outerHTML"))

    def test_small_dark_by_keyboard_without_storage_and_with_no_barrier(self):
        sid, _ = self.met("Read <b>this</b>")
        browser = Browser(self, dark=True, width=500, height=700)
        browser.ask("POST", "/goog/cdp/execute", {
            "cmd": "Emulation.setDeviceMetricsOverride", "params": {
                "width": 320, "height": 600, "deviceScaleFactor": 1, "mobile": True}})
        browser.ask("POST", "/goog/cdp/execute", {
            "cmd": "Page.addScriptToEvaluateOnNewDocument", "params": {"source":
                "for (const name of ['localStorage', 'sessionStorage'])"
                " Object.defineProperty(window, name, {get() { throw new Error('none'); }});"}})
        axe = os.environ.get("NEXUS_TEST_AXE")

        def look():
            self.assertLessEqual(browser.run("return document.documentElement.scrollWidth"), 320)
            if axe:
                with open(axe, encoding="utf-8") as file:
                    browser.run(file.read())
                found = browser.ask("POST", "/execute/async", {"args": [], "script":
                    "const done = arguments[0]; axe.run().then(found => done(found.violations"
                    ".filter(each => ['serious', 'critical'].includes(each.impact)).map("
                    "each => each.id + ': ' + each.nodes.map(node => node.html).join(' '))))"})
                self.assertEqual(found, [])
        browser.open(self.client.pair(sid)["url"])
        look()
        keys = {"actions": [{"type": "key", "id": "k", "actions": [
            {"type": kind, "value": value} for value in "\ue004" + "eve" + "\ue007"
            for kind in ("keyDown", "keyUp")]}]}        # Tab, the name, Enter
        browser.ask("POST", "/actions", keys)
        browser.until("document.querySelectorAll('#log .message').length == 1")
        look()
        self.send(sid, "and this")
        browser.until("document.querySelectorAll('#log .message').length == 2")
        for path in ("/w", "/watch"):
            browser.open(self.s.url + path)
            browser.until("document.querySelector('#state').dataset.state != 'waiting'")
            look()
        self.assertEqual(browser.complaints(), [])

    @unittest.skipUnless(shutil.which("zbarimg"), "zbarimg is not here")
    def test_a_decoder_reads_the_codes_that_we_draw(self):
        def read(path):
            done = subprocess.run(["zbarimg", "-q", "--raw", "-Sdisable", "-Sqrcode.enable", path],
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            return done.stdout.decode().strip("\n")
        sid, _ = self.met()
        browser, path = Browser(self), os.path.join(self.home, "page.png")
        self.joined(browser, sid, "eve")
        browser.click("#invite")
        browser.until("document.querySelector('.qr')?.naturalWidth")
        browser.run("document.querySelector('.qr').scrollIntoView()")
        browser.picture(path)
        link = browser.run("return document.querySelector('#panel a').href")
        self.assertEqual(read(path), link)
        picture = os.environ.get("NEXUS_TEST_PICTURE")
        if picture:                     # the one in README: NEXUS_TEST_PICTURE=FILE makes it anew
            browser.click("#panel > button:last-child")
            browser.until("!document.querySelector('#panel').children.length")
            self.send(sid, "Page 3 has a typo, and the figures of May are missing. My password is"
                      " password=" + "hunter2xyz.")
            browser.type("#text", "I am looking at it.\n")
            browser.until("document.querySelectorAll('.mine').length == 1")
            browser.until("document.getAnimations().length == 0")
            browser.picture(picture)


class QrCodes(Case):
    """The codes themselves, without a browser."""

    def test_a_decoder_reads_every_size(self):
        self.assertRaises(ValueError, nexus.qr_rows, "x" * 214)
        for length in (0, 1, 14, 15, 50, 62, 63, 106, 122, 152, 180, 213):
            rows = nexus.qr_rows("http://nexus/p/".ljust(length, "x")[:length])
            self.assertEqual({len(row) for row in rows}, {len(rows)})
            self.assertEqual([row[:7] for row in rows[:2]], ["1111111", "1000001"])
            if shutil.which("zbarimg") and length:
                side, path = 3 * (len(rows) + 8), os.path.join(self.folder(), "x.pgm")
                with open(path, "wb") as file:
                    file.write(b"P5 %d %d 255\n" % (side, side) + b"".join(
                        b"".join(b"\0\0\0" if sign == "1" else b"\xff\xff\xff" for sign in row) * 3
                        for row in ["0" * (len(rows) + 8)] * 4 + ["0000%s0000" % row
                        for row in rows] + ["0" * (len(rows) + 8)] * 4))
                found = subprocess.run(["zbarimg", "-q", "--raw", path], stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL)
                self.assertEqual(found.stdout.decode().strip("\n"),
                                 "http://nexus/p/".ljust(length, "x")[:length])

    def test_the_terminal_shows_the_same(self):
        rows, lines = nexus.qr_rows("http://nexus/p/X"), nexus.qr_text("http://nexus/p/X")
        drawn = []
        for line in lines:
            drawn += ["".join("01"[sign in there] for sign in line) for there in (
                " \u2584", " \u2580")]
        self.assertEqual([row[4:-4] for row in drawn[4:4 + len(rows)]], rows)


# ----------------------------------------------------------------------------------------
# To teach with
#
# A lesson shows what is true: its checks are those of the self-test, its lines are the file's.
# ----------------------------------------------------------------------------------------


class Learner:
    """Standard input of somebody who errs first; looks at what is on the screen."""

    def __init__(self, screen, *right):
        self.screen, self.asked, self.right = screen, collections.Counter(), list(right)

    def readline(self):
        prompt = self.screen.getvalue().splitlines()[-1]
        self.asked[prompt] += 1
        if "Enter" in prompt:
            return "\n"
        if prompt == "Which? ":
            return "%d\n" % self.asked[prompt]
        return ["nonsense\n", "send \"\n", "\n", "nexus.py %s\n" % self.right[0]][
            min(self.asked[prompt], 4) - 1]


class Lessons(Case):
    """learn, selftest, demo."""

    def setUp(self):
        self.home, code = self.folder(), nexus.import_code      # compiled once for all
        for owner, name, value in ((nexus, "LESSON_SECONDS", 60), (tempfile, "tempdir", self.home),
                                   (nexus, "import_code", lambda path, _: code(path, CACHE.name))):
            change = patched(owner, name, value)
            change.__enter__()
            self.addCleanup(change.__exit__, None, None, None)

    def test_each_lesson_keeps_its_promise_within_a_screen(self):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            for each in [Started(nexus.play, lesson, wire=True) for lesson in nexus.LESSONS]:
                each.result(120)
        lines = out.getvalue().splitlines()
        for lesson in nexus.LESSONS:
            self.assertEqual(lines.count(lesson.__doc__), 1)
        self.assertEqual([sum(line.startswith(begin) for line in lines) for begin in (
            "Answer: ", "The lines of this file that do it:")], [10, 10])
        for sign in (">", "<"):
            self.assertGreater(sum(line.startswith(sign) for line in lines), 20)
        with open(NEXUS, encoding="utf-8") as file:
            source = file.read().splitlines()
        for line in lines:
            quoted = re.match(r"(?: +|)(\d{3,5})  (.*)", line)
            if quoted:
                self.assertEqual(quoted[2].strip(), source[int(quoted[1]) - 1].strip())
            elif "$ nexus.py" not in line:
                self.assertLessEqual(len(line), 80, line)
        self.assertEqual(os.listdir(self.home), [])

    def test_who_errs_is_told_and_tries_again(self):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            learner = Learner(out, "tx ack 1")
            with patched(sys, "stdin", learner), patched(sys, "argv", ["nexus.py", "learn", "4"]):
                self.assertEqual(nexus.main(), 0)
        text = out.getvalue()
        for told in ("unknown command: nonsense", "No closing quotation", "No. Look again",
                     "Not yet. For instance: nexus.py tx ack 1", "Which? Yes.", "That is it.",
                     "Next: nexus.py learn 5", "-- Enter goes on --"):
            self.assertIn(told, text)
        self.assertEqual(learner.asked["bob$ nexus.py "], 4)

    def test_nobody_to_answer_a_number_too_high_and_a_list(self):
        ran = run_here(self.home, "learn")
        self.assertEqual((ran.code, ran.out.count("\n")), (0, len(nexus.LESSONS) + 2))
        for word, told in (("11", "1 to 10"), ("x", "NUMBER"), ("5", "--yes")):
            ran = run_here(self.home, "learn", word)
            self.assertEqual(ran.code, 2)
            self.assertIn(told, ran.err)

    def test_the_self_test_says_what_does_not_hold(self):
        def good(stage):
            """One"""

        def bad(stage):
            """Two"""
            stage.check("it is broken", False)
        with patched(nexus, "LESSONS", (good, bad)):
            ran = run_here(self.home, "selftest")
        self.assertEqual(ran.code, 1)
        self.assertRegex(ran.out, r"[0-9a-f]{64}  nexus.py .*\nok +One\nFAILED \(it is broken\)"
                                  r" Two\n"
                                  r"1 promise\(s\) do not hold")

    def test_the_demo_shows_it_all_and_leaves_nothing_behind(self):
        ran = run_nexus(self.home, "demo", "--step", input="\n" * 9, TMPDIR=self.home,
                        TEMP=self.home, TMP=self.home)
        self.assertEqual((ran.code, ran.out.count("Enter goes on")), (0, 8), ran)
        for verb in ("create", "pair", "claim", "send", "poll", "leave"):
            self.assertIn("$ nexus.py " + verb, ran.out)
        self.assertIn("bob (verified): Page 3 has a typo.", ran.out)
        self.assertEqual(os.listdir(self.home), [])
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", ran.out)[1])
        with self.assertRaises(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()

    def test_an_exercise_is_told_what_is_missing_until_nothing_is(self):
        folder = self.folder()
        for path in (NEXUS, README, os.path.abspath(__file__)):
            shutil.copy(path, folder)

        def change(name, *pairs):
            path = os.path.join(folder, name)
            with open(path, encoding="utf-8") as file:
                text = file.read()
            for before, after in pairs:
                self.assertEqual(text.count(before), 1, before)
                text = text.replace(before, after + before)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)

        def tests():
            done = subprocess.run(
                [sys.executable, "test_nexus.py", "Descriptions", "FlagsAndHelp", "RedactTest",
                 "ReadmeTellsTheTruth.test_its_table_names_every_setting_with_its_default"],
                cwd=folder, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=300)
            return done.returncode, done.stderr.decode()
        change("nexus.py", ('@operation("GET", "/v1/stats"', '''
@operation("GET", "/v1/motto", "Motto")
def motto(call):
    """A word to begin the day with"""
    return {"motto": call.app.settings.motto}


'''), ('    Setting("quiet", ', '    Setting("motto", "Go on.", None, "what it says"),\n'),
               ("def verb_selftest(", "def verb_motto(args):\n"
                "    say(connect(args).motto())\n\n\n"),
               ('    "selftest": Verb(', '    "motto": Verb(verb_motto, "", "", "motto"),\n'),
               ('    Rule("npm-token", ', '    Rule("school-key", "pupil_", r"[0-9]{14,}"),\n'))
        code, told = tests()
        self.assertEqual(code, 1, told)
        for sentence in (
                "An answer is a Motto, and no row of SHAPES says what is in it.",
                "No call here of get /v1/motto: add one",
                "The operation motto can be called by nobody who writes Python: add a method",
                "README's table of options has no row for --motto.",
                "Nobody knows what the verb motto does: its function needs a docstring.",
                "No example begins with pupil_: add one to TOKENS."):
            self.assertIn("\n" + sentence, told)
        change("nexus.py", ('    "Stats": "activeSessions', '    "Motto": "motto",\n'),
               ("    say(connect(args).motto())", '    """Print the motto of the server"""\n'),
               ("    def stats(self):", "    def motto(self):\n"
                '        """The motto of the server"""\n'
                "        return self._do(motto, {})\n\n"))
        change("README.md", ("| `--quiet` |", "| `--motto` | `Go on.` | what it says |\n"))
        change("test_nexus.py", ('        made = call("PUT", "/v1/sessions", '
                                 '{"creatorAgentId": "ada", "greeting": TOKEN})',
                                 '        call("GET", "/v1/motto")\n'),
               ('    ("npm-token", ' '"npm"', '    ("school-key", "pupil" + "_20261126000017"),\n'))
        code, told = tests()
        self.assertEqual(code, 0, told)

    @unittest.skipUnless(os.name == "posix", "signals end a process on Windows")
    def test_the_demo_leaves_its_server_running_if_told_to(self):
        process = subprocess.Popen(
            COMMAND + ["demo", "--serve"], env=clean_environment(self.home, TMPDIR=self.home),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.addCleanup(process.kill)
        lines = []
        while "/p/" not in "".join(lines[-1:]) or "$" in lines[-1]:
            lines.append(process.stdout.readline().decode())
            self.assertTrue(lines[-1], lines)
        link = lines[-1].strip()
        client = nexus.Client(link.partition("/p/")[0])
        self.assertEqual(client.pair_status(link)["state"], "pending")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        self.assertEqual((process.returncode, b"Traceback" in err), (0, False), err)
        self.assertEqual(os.listdir(self.home), [])


# ----------------------------------------------------------------------------------------
# Pipes
#
# Lines of stdin become messages, many in one request. Whatever stops them, it is said how many are
# stored and how to go on, and who goes on doubles nothing.
# ----------------------------------------------------------------------------------------


class SlowTime:
    """queue.Queue and a clock for lines_of(): a script of (when, chunk) comes in its own time."""

    def __init__(self, *script):
        self.now, self.script = 0.0, list(script)

    def __getattr__(self, name):
        return getattr(time, name)              # the server's threads look at the clock, too

    def queue(self, _size):
        """What stands in for the queue; what the reading thread puts there is not needed."""
        self.put = lambda chunk: None
        return self

    def monotonic(self):
        """The time of the script."""
        return self.now

    def get(self, timeout):
        """The next chunk, if it comes in time."""
        when, chunk = self.script[0]
        if when > self.now + timeout:
            self.now += timeout
            raise nexus.queue.Empty
        self.now = max(self.now, when)
        return self.script.pop(0)[1]


class Pipes(CliCase):
    """tx send --lines, --jsonl, --batch."""

    def pipe(self, *words, input="", code=0, **more):
        """Run `tx send`: what it printed."""
        with patched(nexus, "stop_on_signals", lambda: None):   # they are for a process of its own
            ran = self.cli("tx", "send", *words, input=input, **more)
        self.assertEqual(ran.code, code, ran)
        return ran

    @contextlib.contextmanager
    def counted(self, sizes):
        """How many lines each request has goes into `sizes`; nothing goes early."""
        original = nexus.Messages._store

        def store(messages, part):
            sizes.append(len(part))
            return original(messages, part)
        with patched(nexus.Messages, "_store", store), patched(nexus, "MANY_SECONDS", 60):
            yield

    def contents(self, channel):
        """Everything in a channel, as it was stored."""
        found = []
        while not found or found[-1].more:
            last = found[-1][-1]["id"] if found else 0
            found.append(self.s.client().messages.inbox(channel, last, 1000))
        return [row["content"] for page in found for row in page]

    def test_a_file_is_stored_line_by_line_in_full_requests(self):
        lines, sizes = ["%d \u2603 x" % number for number in range(2345)], []
        with self.counted(sizes):
            ran = self.pipe("file", "--lines", "--sender", "s", "--ttl", "1h", "--task", "t",
                            "--correlation", "c", "--metadata", '{"a":1}', input="\n".join(lines))
        self.assertEqual((ran.out, sizes), ('2345 message(s) sent to channel "file"\n',
                                            [1000, 1000, 345]))
        self.assertEqual(self.contents("file"), lines)
        row = self.s.client().messages.inbox("file", limit=1)[0]
        self.assertEqual([row[name] for name in ("sender", "taskId", "correlationId", "metadata")],
                         ["s", "t", "c", {"a": 1}])
        self.assertEqual(day_time(row["expiresAt"]) - day_time(row["createdAt"]),
                         3600000)

    def test_lines_end_as_they_end_anywhere_and_json_shows_what_is_stored(self):
        ran = self.pipe("ends", "--lines", "--json", input=b"a\r\nb\rc\n\xe2\x98\x83\tlast")
        rows = [json.loads(line) for line in ran.out.splitlines()]
        self.assertEqual([(row["content"], row["sender"], row["status"]) for row in rows], [
            (text, "cli", "pending") for text in ("a", "b\rc", "\u2603\tlast")])
        self.assertEqual(self.contents("ends"), ["a", "b\rc", "\u2603\tlast"])
        self.assertEqual(self.pipe("ends", "--lines").out,
                         '0 message(s) sent to channel "ends"\n')
        self.assertEqual(self.pipe("--jsonl").out, "0 message(s) sent to 0 channels\n")

    def test_each_json_line_has_the_fields_of_a_send(self):
        rows = [{"content": "one"}, {"content": "two", "channel": "other", "sender": "me",
                                     "ttlSeconds": 60, "metadata": {"a": [1]}, "taskId": "t"},
                {"content": "three", "id": 7, "status": "acked", "correlationId": None,
                 "channel": "jsonl", "sender": None}]
        text = "\n".join(json.dumps(row) for row in rows)
        ran = self.pipe("jsonl", "--jsonl", "--sender", "us", "--correlation", "c", input=text)
        self.assertEqual(ran.out, "3 message(s) sent to 2 channels\n")
        mine, other = (self.s.client().messages.inbox(name) for name in ("jsonl", "other"))
        self.assertEqual([(row["content"], row["sender"], row["correlationId"]) for row in mine],
                         [("one", "us", "c"), ("three", "us", "c")])
        self.assertEqual([(row["sender"], row["metadata"], row["taskId"], row["correlationId"])
                          for row in other], [("me", {"a": [1]}, "t", "c")])
        self.assertEqual(self.pipe("--jsonl", input=text.split("\n")[2]).out,
                         '1 message(s) sent to channel "jsonl"\n')
        again = self.cli("tx", "inbox", "other", "--json").out  # what inbox shows can be sent on
        self.pipe("--jsonl", input=json.dumps(json.loads(again)[0]))
        self.assertEqual(len(self.contents("other")), 2)

    def test_the_mark_that_windows_puts_before_a_file_is_no_part_of_it(self):
        self.text("send", "--jsonl", input=b'\xef\xbb\xbf{"channel": "bom", "content": "x"}\n')
        self.text("send", "bom", "--lines", input=b"\xef\xbb\xbfy\n\xef\xbb\xbfz\n")
        self.assertEqual([row["content"] for row in self.s.client().messages.inbox("bom")],
                         ["x", "y", "\ufeffz"])

    def test_a_bad_line_is_told_by_its_number_and_nothing_of_its_batch_is_stored(self):
        good = [b"%d" % number for number in range(5)]
        cases = [([], b"\xff", "not UTF-8"), ([], b"", "content must not be empty"),
                 (["--jsonl"], b"{", "Expecting"), (["--jsonl"], b"[]", "not a JSON object"),
                 (["--jsonl"], b"{}", "content is required"), (["--jsonl"], b"", "Expecting"),
                 (["--jsonl"], b'{"content":"x","channel":""}', "channel must not be empty"),
                 (["--jsonl"], b'{"content":"x","ttlSeconds":0}', "ttlSeconds must be at least"),
                 (["--jsonl"], b'{"content":"x","metadata":[]}', "metadata must be an object"),
                 (["--jsonl"], b"[" * 200, "nested"), ([], b"x" * 3001, "too long for this server"),
                 ([], b"x" * 9001, "more than 9000 bytes")]
        tight = self.server(max_body=3000)
        for number, (flags, bad, told) in enumerate(cases):
            channel, lines = "bad%d" % number, list(good)
            lines = [b'{"content":"%s"}' % line for line in good] if flags else lines
            lines[3:3] = [bad]
            with self.subTest(told), patched(nexus, "MAX_MANY", 2), \
                    patched(nexus, "LINE_BYTES", 9000):
                ran = self.pipe(channel, *flags or ["--lines"], "--json", code=1, url=tight.url,
                                input=b"\n".join(lines) + b"\n")
                *rows, wrong = [json.loads(line) for line in ran.out.splitlines()]
                alone = "too long for" in told          # such a line goes by itself
                self.assertEqual([row["content"] for row in rows], ["0", "1"] + ["2"] * alone)
                self.assertEqual((wrong["error"], wrong["line"], wrong["stored"]),
                                 ("invalid_line", 4, 2 + alone))
                self.assertRegex(wrong["message"], r"^Line 4: .*%s" % told)
                self.assertEqual(tight.client().messages.pending(channel), 2 + alone)
                lines[3:4] = []                 # mended, and on as we were told
                words = nexus.shlex.split(wrong["resume"])
                self.assertEqual(words[:3], ["nexus.py", "tx", "send"])
                self.pipe(*words[3:], url=tight.url, input=b"\n".join(lines))
                self.assertEqual([row["content"] for row in tight.client().messages.inbox(channel)],
                                 ["0", "1", "2", "3", "4"])
        ran = self.pipe("text", "--lines", code=1, input=b"a\n\xff")
        self.assertEqual(ran.out, "")
        self.assertRegex(ran.err, r"(?m)^Error: Line 2: not UTF-8; 0 line\(s\) are stored; to go"
                         r" on without doubling: nexus.py tx send text --lines --batch \w+ < ")
        self.assertIn("Line 1: channel is required", self.pipe(
            "--jsonl", code=1, input='{"content":"x"}').err)

    def test_what_one_request_cannot_hold_goes_in_several(self):
        small = self.server(max_body=3000)
        lines = ["%d %s" % (number, "x" * 100) for number in range(100)]
        self.pipe("small", "--lines", input="\n".join(lines), url=small.url)
        self.assertEqual([row["content"] for row in small.client().messages.inbox(
            "small", limit=1000)], lines)
        heavy, sizes = ["\u2603" * 60000] * 3 + ["x"], []         # 180,000 bytes each
        with self.counted(sizes):
            self.pipe("heavy", "--lines", input="\n".join(heavy))
        self.assertEqual((self.contents("heavy"), sizes), (heavy, [2, 2]))

    def test_the_same_batch_again_stores_each_line_once(self):
        lines = ["%d" % number for number in range(30)]
        for text in ("\n".join(lines[:20]), "\n".join(lines), "\n".join(lines)):
            self.pipe("again", "--lines", "--batch", "k", input=text)
        self.assertEqual(self.contents("again"), lines)
        ran = self.pipe("again", "--lines", "--batch", "k", input="other", code=1)
        self.assertRegex(ran.err, r"Error: This --batch key was used for another.*; 0 line")
        self.pipe("again", "--lines", input="\n".join(lines))       # without a key it is new
        self.assertEqual(self.contents("again"), lines * 2)

    def test_a_server_that_is_away_is_told_with_the_way_to_go_on(self):
        ran = self.pipe("c", "--lines", "--sender", "a b", "--batch", "k", "--metadata", "{}",
                        input="x", code=1, url=DEAD_URL)
        self.assertRegex(ran.err, r"serve; 0 line\(s\) are stored; .*: nexus.py tx send c --sender"
                                  r" 'a b' --metadata '\{\}' --lines --batch k < the same input\n$")

    def test_an_eaten_answer_of_a_batch_is_no_double(self):
        eaten = Scripted(self, lambda request: self.relay(request) and b"", self.relay)
        client = eaten_client = nexus.Client(eaten.url, sleep=lambda seconds: None)
        rows = list(client.messages.send_many([{"channel": "eaten", "content": "x"}]))
        self.assertEqual(len(eaten.requests), 2)
        self.assertEqual([row["id"] for row in rows], [
            row["id"] for row in self.s.client().messages.inbox("eaten")])
        eaten_client.close()

    def relay(self, request):
        """What our server answers to a request."""
        return self.s.raw(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))

    def test_what_comes_within_50_ms_goes_in_one_request_and_nothing_waits_longer(self):
        for script, wanted in (
                ([(0, b"a\nb\n"), (0.04, b"c\n"), (0.06, b"d\n"), (9, b"")],
                 [b"a", b"b", b"c", None, b"d", None] + [None] * 9),    # and once a second
                ([(number * 0.02, b"%d\n" % number) for number in range(6)] + [(0.1, b"e")] + [
                    (0.1, b"")], [b"0", b"1", b"2", None, b"3", b"4", b"5", b"e"]),
                ([(5, b"a"), (5.5, b"b\nc"), (5.51, b"")], [None] * 4 + [b"ab", b"c"]),
                ([(0, b"\n\na\n"), (0, b"")], [b"", b"", b"a"]), ([(0, b"")], [])):
            time_of = SlowTime(*script)
            with patched(nexus.queue, "Queue", time_of.queue), patched(nexus, "time", time_of):
                found = list(nexus.lines_of(io.BytesIO()))
            self.assertEqual([each for each in found if each is not None],
                             [each for each in wanted if each is not None])
            self.assertEqual(found[:len(wanted)], wanted[:len(found)], script)

    def test_a_read_that_fails_is_no_end(self):
        class Broken(io.BytesIO):
            """Bytes, then an error."""
            def read(self, size=-1):
                return super().read(size) or refusing(OSError(5, "unreadable"))()
        lines = nexus.lines_of(Broken(b"a\n"))
        self.assertEqual(next(lines), b"a")
        with self.assertRaisesRegex(OSError, "unreadable"):
            list(lines)
        long, parts = io.BytesIO(), iter([b"x" * 100] * 50 + [b""])
        long.read = lambda size: next(parts)
        with patched(nexus, "LINE_BYTES", 1000):        # what is too long is not kept whole
            self.assertEqual(len(next(nexus.lines_of(long))), 1100)
        late = iter([b"a", None, b"b\nc\n", b""])           # None: not yet, of a pipe without wait
        stream = io.BytesIO()
        stream.read = lambda size: next(late)
        self.assertEqual([each for each in nexus.lines_of(stream) if each], [b"ab", b"c"])

    def test_words_that_make_no_sense_together_are_wrong_usage(self):
        for words in (["c", "x", "--lines"], ["c", "x", "--jsonl"], ["--lines"], ["c"], [],
                      ["c", "--lines", "--jsonl"], ["c", "x", "--batch", "k"],
                      ["c", "--lines", "--idempotency-key", "k"],
                      ["c", "--lines", "--metadata", "{"]):
            ran = self.pipe(*words, input="line", code=2)
            self.assertEqual(ran.out, "")
            self.assertIn("See: nexus.py help tx send", ran.err)

    def test_many_messages_of_a_client_carry_its_name_and_go_when_told(self):
        client, seen = self.s.client(sender="me"), []

        def messages():
            for number in range(3):
                yield {"channel": "told", "content": "%d" % number, "sender": "you"
                       if number else None}
                yield None
                seen.append(self.s.client().messages.pending("told"))
        rows = list(client.messages.send_many(messages()))
        self.assertEqual(([row["sender"] for row in rows], seen), (["me", "you", "you"], [1, 2, 3]))
        self.assertEqual(list(client.messages.send_many([])), [])


@unittest.skipUnless(os.name == "posix", "pipes, terminals and signals as POSIX has them")
class PipeProcesses(CliCase):
    """What only processes show: pipes that end, signals, a terminal."""

    start = VerbProcesses.start

    def pending(self, channel):
        """How many are there."""
        return self.s.client().messages.pending(channel)

    def test_who_types_waits_for_nobody(self):
        typing = self.start("tx", "send", "typed", "--lines", "--json", stdin=subprocess.PIPE)
        for number in range(3):
            typing.stdin.write(b"line %d\n" % number)
            typing.stdin.flush()
            line = Started(typing.stdout.readline).result()
            self.assertEqual(json.loads(line.decode())["content"], "line %d" % number)
        out, err = typing.communicate(timeout=20)
        self.assertEqual((typing.returncode, out), (0, b""), err)

    def test_interrupted_it_says_how_to_go_on_and_nothing_doubles(self):
        for how in (signal.SIGINT, signal.SIGTERM):
            channel = "stopped %d" % how
            lines = b"".join(b"%d\n" % number for number in range(2500))
            process = self.start("tx", "send", channel, "--lines", stdin=subprocess.PIPE)
            process.stdin.write(lines[:len(lines) // 2])
            process.stdin.flush()
            until(lambda: self.pending(channel) > 1000)
            process.send_signal(how)
            self.assertEqual(process.wait(20), 130)
            told = process.stderr.read().decode()
            self.assertNotIn("Traceback", told)
            words = nexus.shlex.split(re.search(
                r"Stopped; \d+ line\(s\) are .* doubling: nexus.py (.*) < the same input", told)[1])
            self.assertIn(channel, words)
            again = self.start(*words, stdin=subprocess.PIPE)
            out, err = again.communicate(lines, timeout=60)
            self.assertEqual((again.returncode, out.decode()),
                             (0, '2500 message(s) sent to channel "%s"\n' % channel), err)
            self.assertEqual(self.pending(channel), 2500)

    def test_a_reader_that_has_had_enough_loses_nothing(self):
        reader, writer = os.pipe()
        process = subprocess.Popen(
            COMMAND + ["tx", "send", "head", "--lines", "--json"], stdin=subprocess.PIPE,
            stdout=writer, stderr=subprocess.PIPE,
            env=clean_environment(self.home, NEXUS_URL=self.s.url))
        os.close(writer)
        process.stdin.write(b"first\n")
        process.stdin.flush()
        self.assertIn(b"first", Started(os.read, reader, 1000).result())
        os.close(reader)                        # as head -1 does
        _, err = process.communicate(b"".join(b"%d\n" % number for number in range(3000)), 60)
        self.assertEqual((process.returncode, err.count(b"\n")), (0, 1), err)   # server: ...
        self.assertEqual(self.pending("head"), 3001)

    def test_a_terminal_sees_how_far_it_is(self):
        path, (ours, theirs) = os.path.join(self.home, "lines"), os.openpty()
        with open(path, "w") as file:
            file.writelines("line %d\n" % number for number in range(2500))
        with open(path) as file, open(ours, "rb", 0) as terminal:
            process = subprocess.Popen(
                COMMAND[:-1] + [COMMAND[-1].replace("; ", "; nexus.PROGRESS_SECONDS = 0.001; "),
                                "tx", "send", "far", "--lines"], stdin=file, stdout=subprocess.PIPE,
                stderr=theirs, env=clean_environment(self.home, NEXUS_URL=self.s.url))
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):      # EIO: the other side has gone
                for part in iter(lambda: terminal.read(1000), b""):
                    shown += part
            out, _ = process.communicate(timeout=60)
        self.assertEqual(out, b'2500 message(s) sent to channel "far"\n')
        self.assertRegex(shown, rb"^[^\n]*\n\d+ message\(s\), \d+/s, 100 % *\r"
                         if shown[:7] == b"server:" else rb"^\d+ message\(s\), \d+/s, 100 % *\r")
        self.assertEqual(shown[-51:], b" " * 50 + b"\r")


# ----------------------------------------------------------------------------------------
# At home in a shell
#
# Times with units, tables, colours and local time for people and for nobody else; a home for each
# of two people on one machine; a launcher and completion that run for real.
# ----------------------------------------------------------------------------------------


class Durations(CliCase):
    """90, 30s, 2h, 1h30m."""

    def test_forms(self):
        for text, seconds in (("90", 90), ("0", 0), ("30s", 30), ("5m", 300), ("2h", 7200),
                              ("1d", 86400), ("1h30m", 5400), ("1d2h3m4s", 93784), ("1.5h", 5400),
                              ("1.1m", 66), ("0.5m", 30), (str(2 ** 63 - 1), 2 ** 63 - 1)):
            found = nexus.duration(text)
            self.assertEqual((found, type(found)), (seconds, int), text)
        for text in ("", "soon", "-1", "1h30", "h", "1 h", "1e5", "1.5", "0.1s", "1.2.3", "1w",
                     "1H", "9" * 400 + ".5", "9" * 5000, "\u0663", "1h-", "inf", "nan"):
            with self.assertRaisesRegex(ValueError, "90, 30s, 5m, 2h, 1d or 1h30m, not "):
                nexus.duration(text)
        self.assertEqual(nexus.duration("0.05", whole=False), 0.05)
        self.assertEqual(nexus.duration("1.5", False, "h"), 5400)

    def test_every_time_takes_units_and_what_is_none_shows_the_forms(self):
        timed = {"--ttl", "--wait", "--interval", "--lease", "--delay", "--timeout",
                 "--acked-older-than", "--slow"}
        self.assertEqual({flag for flag, row in nexus.FLAGS.items()
                          if row.kind in (nexus.duration, nexus.age_in_hours)}, timed)
        self.assertEqual(nexus.FLAGS["--acked-older-than"].kind("1d"), 24)
        self.assertEqual(nexus.FLAGS["--acked-older-than"].kind("1.5"), 1.5)
        self.assertEqual(self.ok("create", "--ttl", "1h30m")["ttl"], 5400)
        for words in (["create", "--ttl", "soon"], ["poll", "x", "--wait", "1.5"],
                      ["heartbeat", "x", "--interval", "1w"]):
            self.assertIn("30s, 5m, 2h", self.no("usage", *words, code=2).json["message"])
        for words in (["outbox", "gc", "--acked-older-than", "x"],
                      ["lease", "c", "--consumer", "w", "--lease", "1"  "h30"]):
            self.assertRegex(self.cli("tx", *words).err, r"argument --\S+: a time looks like 90")
        found = self.ok("status", self.opened(), NEXUS_HTTP_TIMEOUT="1m")
        self.assertEqual(found["state"], "active")
        self.assertIn("30s", self.no("usage", "status", "x", NEXUS_HTTP_TIMEOUT="soon",
                                     code=2).json["message"])

    def test_settings_of_time_take_units_too(self):
        settings = nexus.Settings({"max_ttl": "1d", "agent_inactivity": "5m"})
        self.assertEqual((settings.max_ttl, settings.agent_inactivity), (86400, 300))
        self.assertEqual(nexus.Settings({}, {"NEXUS_MAX_TTL": "2h"}).max_ttl, 7200)
        for given, told in (({"max_ttl": "soon"}, r"--max-ttl \(NEXUS_MAX_TTL\).*'soon'; .*1h30m"),
                            ({"max_ttl": "0s"}, "between"), ({"max_body": "1k"}, "'1k'$"),
                            ({"agent_inactivity": "-5"}, "30s")):
            with self.assertRaisesRegex(ValueError, told):
                nexus.Settings(given)


class ForEyes(CliCase):
    """Tables, colours, local times; tx channels and tx ack of several."""

    def test_columns_are_aligned_by_what_a_terminal_shows(self):
        out = Stream()
        self.assertEqual(nexus.table(out, ("NAME", "N", "WHEN"), [
            ("a", 7, None), ("\u4e2d\uff21", 12345, "now"), ("e\u0301x", 0, ""),
            ("\x1b[2J", 1, "x")]),
            ["NAME     N      WHEN", "a            7  -", "\u4e2d\uff21     12345  now",
             "e\u0301x           0  -", "\\x1b[2J      1  x"])
        self.assertEqual(nexus.table(out, ("A", "B"), []), ["A  B"])

    def test_colours_are_for_terminals_without_no_color(self):
        for tty, no_color, shown in ((True, "", "\x1b[1mx\x1b[0m"), (True, "1", "x"),
                                     (False, "", "x")):
            with patched(nexus.os, "environ", dict(os.environ, NO_COLOR=no_color)):
                self.assertEqual(nexus.painted(Stream(tty=tty), 1, "x"), shown)
        with patched(nexus.os, "name", "nt"):
            for environ, shown in (({}, "x"), ({"WT_SESSION": "y"}, "\x1b[2mx\x1b[0m")):
                with patched(nexus.os, "environ", environ):
                    self.assertEqual(nexus.painted(Stream(tty=True), 2, "x"), shown)

    @unittest.skipUnless(hasattr(time, "tzset"), "no tzset")
    def test_times_are_local_on_a_terminal_and_utc_elsewhere(self):
        with patched(nexus.os, "environ", os.environ):
            before = os.environ.get("TZ")
            os.environ["TZ"] = "XYZ-3:30"
            time.tzset()
            try:
                terminal, pipe, when = Stream(tty=True), Stream(), "2026-12-31T22:00:00.123Z"
                self.assertEqual(nexus.local(terminal, when), "2027-01-01 01:30:00")
                self.assertEqual(nexus.local(pipe, when), "2026-12-31 22:00:00")
                self.assertEqual(nexus.zone(terminal) + nexus.zone(pipe), ", times in XYZ")
                for odd in ("soon", "2026-13-31T22:00:00.123Z", None, 7):
                    self.assertEqual(nexus.local(terminal, odd), odd and str(odd)[:19].replace(
                        "T", " "))
                self.s.client().messages.send("clock", "x\x1b[2J")
                ran = self.cli("tx", "inbox", "clock", tty=True)
                self.assertRegex(ran.out, r"^\x1b\[2m\[\d+\] \S+ \S+\x1b\[0m api: x\\x1b\[2J\n\n"
                                          r"\x1b\[2m1 message\(s\), times in XYZ\x1b\[0m\n$")
                plain = self.cli("tx", "inbox", "clock", tty=True, NO_COLOR="1").out
                piped = self.text("inbox", "clock")
                self.assertNotIn(plain.split()[2], piped)
                self.assertEqual(len(plain), len(piped) + len(", times in XYZ"))
                sid = self.opened()
                self.assertRegex(self.cli("renew", sid).err, r"Lives until \S+ \S+\.\n$")
            finally:
                os.environ.pop("TZ")
                os.environ.update({"TZ": before} if before else {})
                time.tzset()

    def test_channels_are_a_table_with_a_way_to_the_next(self):
        own = self.server()
        self.assertEqual(self.text("channels", url=own.url), "No channels\n")
        messages = own.client().messages
        for name, count in (("jobs", 3), ("jobs/2", 1), ("news\n", 2)):
            for number in range(count):
                messages.send(name, "x")
        messages.lease("jobs", "w")
        shown = self.text("channels", url=own.url).split("\n")
        self.assertRegex(shown[0], r"^CHANNEL  PENDING  LEASED  DEAD  OLDEST PENDING +LAST$")
        self.assertRegex(shown[1], r"^jobs           3       1     0  \S+ \S+  \S+ \S+$")
        self.assertRegex(shown[3], r"^news\u21b5          2       0     0  ")
        self.assertEqual(shown[4:], ["", "3 channel(s)", ""])
        rows = self.ok("tx", "channels", "--json", "--prefix", "jobs", url=own.url)
        self.assertEqual([(row["channel"], row["pending"]) for row in rows],
                         [("jobs", 3), ("jobs/2", 1)])
        last = self.text("channels", "--limit", 1, "--prefix", "j", url=own.url).split("\n")[-2]
        self.assertEqual(last, "1 channel(s); more: tx channels --after jobs --limit 1 --prefix j")
        words = last.partition(": tx ")[2].split()
        self.assertIn("\njobs/2 ", self.text(*words, url=own.url))

    def test_several_are_acknowledged_at_once_and_each_is_told(self):
        ids = [self.s.client().messages.send("several", "x")["id"] for _ in range(5)]
        self.assertEqual(self.text("ack", *ids[:2]), "".join(
            "Message %d acknowledged\n" % each for each in ids[:2]))
        ran = self.cli("tx", "ack", ids[1], ids[2], 999999)
        self.assertEqual((ran.code, ran.out), (1, "Message %d acknowledged\n" % ids[2]))
        self.assertIn("Error: Message already acked: %d\nError: Message not found: 999999\n"
                      % ids[1], ran.err)
        ran = self.cli("tx", "ack", ids[2], ids[3], "--json")
        self.assertEqual((ran.code, [(row["id"], row["ok"]) for row in ran.json]),
                         (1, [(ids[2], False), (ids[3], True)]))
        self.assertEqual(ran.json[0]["error"], "message_already_acked")
        ran = self.cli("tx", "ack", ids[4], ids[3], "--lease-token", "t")
        self.assertEqual((ran.code, self.s.client().messages.pending("several")), (2, 1))
        self.assertIn("unrecognized", self.cli("tx", "ack", ids[4], "--odd").err)


class Trace(CliCase):
    """--trace: what went over the wire, keys masked, and the same as a curl line."""

    SETTINGS = {"token": "t0ken-" + "of-the-server"}

    def traced(self, *words, **environ):
        """stderr of a verb, and the curl line of its last exchange."""
        ran = self.cli(*words, "--trace", NEXUS_TOKEN=self.SETTINGS["token"], **environ)
        self.assertEqual(ran.code, 0, ran)
        return ran, re.findall(r"(?m)^\$ (curl .*)$", ran.err)[-1]

    def key_of(self, ran):
        """The session key that `create` has kept."""
        with open(self.kept(ran.json["sessionId"], "key")) as file:
            return file.read().strip()

    def test_it_shows_request_answer_time_and_no_key(self):
        ran, _ = self.traced("create", "--creator-agent-id", "ada", "--alias", "talk")
        key = self.key_of(ran)
        said = self.traced("send", "talk", "It's \u202e \x1b[31m")[0].err
        for line in (r"> POST /v1/sessions/\w+/messages HTTP/1\.1", r"> X-Session-Key: \.\.\.",
                     r"> Authorization: Bearer \.\.\.", r"  \d+\.\d ms", "< HTTP/1.1 201 Created",
                     r'< \{"ok":true,"id":.*'):
            self.assertRegex(said, "(?m)^%s$" % line)
        self.assertNotIn("\x1b", said)
        self.assertNotIn("\u202e", said)
        for secret in (key, self.SETTINGS["token"]):
            self.assertGreater(len(secret), 10)
            self.assertNotIn(secret, ran.err + said)
        said = self.cli("tx", "send", "c", "x" * 9999, NEXUS_TRACE="1").err
        self.assertRegex(said, r"(?m)^> \.\.\. 1\d{4} characters in all$")
        self.assertLess(len(said), 6000)
        self.assertNotIn("> ", self.cli("tx", "pending", "c", NEXUS_TRACE="0").err)

    def test_an_answer_that_never_came_is_shown(self):
        with socket.create_server(("127.0.0.1", 0)) as sock:
            url = "http://127.0.0.1:%d" % sock.getsockname()[1]
        ran = self.cli("status", "0" * 48, "--trace", url=url)
        self.assertRegex(ran.err, "(?m)^< nothing: No answer from %s" % url)

    @unittest.skipUnless(BASH and shutil.which("curl"), "bash or curl is missing")
    def test_its_curl_line_runs_as_printed(self):
        key = self.key_of(self.traced("create", "--creator-agent-id", "ada", "--alias", "talk")[0])
        for words in (("send", "talk", "It's $HOME, `id`\n\"!"), ("poll", "talk", "--after", "0"),
                      ("tx", "send", "a b/c", "x", "--metadata", '{"k": "v"}'), ("renew", "talk")):
            ran, line = self.traced(*words)
            done = subprocess.run([BASH, "-c", line], stdout=subprocess.PIPE, timeout=60, env=dict(
                os.environ, NEXUS_KEY=key, NEXUS_TOKEN=self.SETTINGS["token"]))
            # A send repeats its answer: its Idempotency-Key went along.
            self.assertEqual(json.loads(done.stdout.decode()),
                             json.loads(re.findall(r"(?m)^< (\{.*)$", ran.err)[-1]))


class TwoPeople(CliCase):
    """--home, NEXUS_HOME."""

    def test_one_machine_can_be_two_people(self):
        ada, bob = (os.path.join(self.home, name) for name in ("ada", "b o b"))
        sid = self.ok("create", "--creator-agent-id", "ada", "--home", ada)["sessionId"]
        code = self.ok("--home", ada, "pair", sid)["code"]
        self.ok("claim", code, "--agent-id", "bob", NEXUS_HOME=bob)
        self.ok("send", sid, "hi", NEXUS_HOME=ada)
        row, = self.ok("poll", sid, "--home", bob, NEXUS_HOME=ada)["messages"]  # the flag wins
        self.assertEqual((row["agentId"], row["verified"]), ("ada", True))
        for path in (os.path.join(ada, "config.json", "x"), "/dev/null"):   # no folder to be made
            with open(os.path.join(ada, "config.json"), "a"):
                before = self.s.app.requests
            for words in (["create", "--creator-agent-id", "eve"], ["claim", code, "--agent-id",
                          "eve"], ["join", sid, "--agent-id", "eve"], ["create", "--alias", "x"]):
                self.assertIn("give another --home", self.no(
                    "broken_state", *words, "--home", path).err)
            self.assertEqual(self.s.app.requests, before)   # nor is anybody in without a key
        os.unlink(os.path.join(ada, "config.json"))
        for words in ([], ["--home", bob]):
            self.assertEqual(self.ok("config", "show", *words, NEXUS_HOME=ada if words else bob)[
                "configPath"], os.path.join(bob, "config.json"))
        self.assertEqual(sorted(os.listdir(self.home)), ["ada", "b o b"])
        self.assertEqual([os.listdir(os.path.join(home, "sessions")) for home in (ada, bob)],
                         [[sid], [sid]])
        if os.name == "posix":
            self.assertEqual([os.stat(home).st_mode & 0o777 for home in (ada, bob)], [0o700] * 2)
        self.ok("create", "--creator-agent-id", "x", NEXUS_HOME="")     # empty: as if it were not
        self.assertIn(".config", os.listdir(self.home))
        with patched(nexus.os, "environ", dict(os.environ, NEXUS_HOME="rel", HOME=self.home)):
            self.assertEqual(nexus.State().root, os.path.abspath("rel"))
            self.assertEqual(nexus.State(ada).root, os.path.join(ada, ".config", "messaging"))
        with patched(nexus.os, "environ", dict(os.environ, NEXUS_HOME="~/x", HOME=self.home,
                                               USERPROFILE=self.home)):
            self.assertEqual(nexus.State().root, os.path.join(self.home, "x"))


class Launcher(CliCase):
    """install, uninstall."""

    def setUp(self):
        super().setUp()
        self.copy = os.path.join(self.home, "it's \"nexus\" $HOME %d \u2603", "nexus.py") \
            if os.name == "posix" else os.path.join(self.home, "nexus", "nexus.py")
        os.mkdir(os.path.dirname(self.copy))
        shutil.copy(NEXUS, self.copy)
        self.bin = os.path.join(self.home, ".local", "bin")
        self.path = os.path.join(self.bin, "nexus" if os.name == "posix" else "nexus.cmd")

    def install(self, *words, code=0, **environ):
        """Run `install` of the copy: its JSON."""
        ran = subprocess.run([sys.executable, self.copy, *words], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env=clean_environment(self.home, **environ))
        self.assertEqual(ran.returncode, code, ran)
        self.told = ran.stderr.decode()
        return json.loads(ran.stdout.decode())

    def launch(self, *words, **environ):
        """Run the launcher: its JSON."""
        ran = subprocess.run([self.path, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             cwd=self.home, env=clean_environment(self.home, **environ))
        self.assertEqual((ran.returncode, ran.stderr), (0, b""))
        return json.loads(ran.stdout.decode())

    def test_it_starts_what_is_compiled_and_notices_a_change(self):
        found = self.install("install")
        self.assertEqual(found, {"ok": True, "launcher": self.path, "runs": self.copy,
                                 "python": sys.executable, "compiled": found["compiled"]})
        self.assertEqual(os.path.dirname(found["compiled"]),
                         os.path.join(os.path.dirname(self.copy), "__pycache__"))
        self.assertIn(self.bin + " is not on PATH", self.told)
        for name in ("json.py", "nexus.py"):            # nothing is imported from where it is run
            with open(os.path.join(self.home, name), "w") as file:
                file.write("raise SystemExit('imported')")
        when = os.stat(found["compiled"]).st_mtime_ns
        self.assertEqual(self.launch("--version", PYTHONPATH=self.home)["version"], nexus.VERSION)
        self.assertEqual(os.stat(found["compiled"]).st_mtime_ns, when)      # it was good as it was
        with open(self.copy, "a") as file:
            file.write("\n")
        with open(self.copy, encoding="utf-8") as file:
            text = file.read().replace('VERSION = "%s"' % nexus.VERSION, 'VERSION = "9.9"')
        with open(self.copy, "w", encoding="utf-8") as file:
            file.write(text)
        self.assertEqual(self.launch("--version")["version"], "9.9")
        self.assertNotEqual(os.stat(found["compiled"]).st_mtime_ns, when)
        if os.name == "posix":
            os.unlink(self.copy)
            ran = subprocess.run([self.path, "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual((ran.returncode, ran.stdout, ran.stderr.decode()), (
                1, b"", "%s is gone: install it again\n" % self.copy))

    def test_it_overwrites_and_removes_its_own_only(self):
        self.install("install", PATH=self.bin + os.pathsep + os.environ["PATH"])
        self.assertNotIn("PATH", self.told)
        self.install("install")                         # our own is replaced
        self.assertEqual(os.listdir(self.bin), [os.path.basename(self.path)])
        self.assertEqual(self.install("uninstall"), {"ok": True, "removed": self.path})
        self.assertEqual(os.listdir(self.bin), [])
        self.assertEqual(self.install("uninstall", code=1)["error"], "no_launcher")
        with open(self.path, "w") as file:
            file.write("mine")
        for verb in ("install", "uninstall"):
            self.assertEqual(self.install(verb, code=1)["error"], "file_exists")
        with open(self.path) as file:
            self.assertEqual(file.read(), "mine")
        if os.name == "posix":
            other = os.path.join(self.home, "other bin")
            self.path = self.install("install", "--bin", other)["launcher"]
            self.assertEqual(self.launch("--version")["version"], nexus.VERSION)
            self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o755)
            os.rename(self.path, self.path + "2")
            os.symlink(self.path + "2", self.path)
            self.assertEqual(self.install("install", "--bin", other, code=1)["error"],
                             "file_exists")
            self.assertEqual(self.install("install", "--bin", self.copy, code=1)["error"],
                             "cannot_install")

    def test_where_nothing_can_be_written_compiled_files_go_to_our_own_folder(self):
        with patched(nexus, "__file__", self.copy), patched(sys, "pycache_prefix", None), \
                patched(nexus.os, "access", lambda *_: False):
            found = self.ok("install")
            self.assertTrue(found["compiled"].startswith(
                os.path.join(self.home, ".config", "messaging", "compiled")), found)
            self.assertEqual(self.launch("--version")["version"], nexus.VERSION)
            self.assertEqual(os.listdir(os.path.dirname(self.copy)), ["nexus.py"])
            odd = os.path.join(self.home, "my-nexus.py")
            os.rename(self.copy, odd)
            with patched(nexus, "__file__", odd):
                self.assertIn("my-nexus.py is no name", self.no("cannot_install", "install").err)

    def test_the_one_for_windows_quotes_what_cmd_would_take(self):
        with patched(nexus.os, "name", "nt"), patched(sys, "executable", "C:\\50% x\\python.exe"):
            with patched(nexus.os.path, "split", lambda path: path.rsplit("\\", 1)):
                text = nexus.launcher_text("C:\\it's 100% \u2603\\nexus.py", None)
        first, second, last = text.split("\r\n")
        self.assertEqual((first, last), ("@rem " + nexus.LAUNCHER_MARK, ""))
        code = re.fullmatch(r'@"C:\\50%% x\\python\.exe" -IS -c "([^"]*)" %\*', second)[1]
        found = []
        names = {"sys": argparse.Namespace(path=found, exit=lambda code: None)}
        exec(code.replace("%%", "%").replace("import sys; ", "").replace(
            "import nexus; sys.exit(nexus.main())", ""), names)
        self.assertEqual((found, names["sys"].pycache_prefix), (["C:\\it's 100% \u2603"], None))


class Completion(CliCase):
    """completion bash|zsh|fish."""

    def script(self, shell):
        """The file with a shell's script."""
        ran = self.cli("completion", shell)
        self.assertEqual((ran.code, ran.err), (0, ""))
        path = os.path.join(self.home, shell)
        with open(path, "w") as file:
            file.write(ran.out)
        return path

    def run_in(self, *command, input=""):
        """What a program of somebody else prints."""
        done = subprocess.run(command, input=input.encode(), stdout=subprocess.PIPE, timeout=60,
                              stderr=subprocess.STDOUT, env=clean_environment(self.home))
        self.assertEqual(done.returncode, 0, done.stdout.decode())
        return done.stdout.decode()

    def alias(self):
        """A session called review-2, and one with a name that no shell should see."""
        sid = self.opened("--alias", "review-2")
        self.ok("alias", sid, "$(touch evil)")

    @unittest.skipUnless(BASH, "bash is missing")
    def test_bash_offers_what_the_table_has(self):
        self.alias()
        path = self.script("bash")
        self.run_in(BASH, "-n", path)
        if shutil.which("shellcheck"):
            self.assertEqual(self.run_in("shellcheck", "-s", "bash", path), "")
        asked = [("", ""), ("", "po"), ("tx", "in"), ("tx", ""), ("tx ack", ""), ("send", "rev"),
                 ("news", "rev"),
                 ("tx outbox", ""), ("--home x tx send builds", "--l"), ("send review-2", "--"),
                 ("help", ""), ("poll", "$"), ("", "*"), ("tx send status", "--"),
                 ("frobnicate", "")]
        asked += [(name, "") for name in nexus.VERBS]
        lines = "".join('COMP_WORDS=(nexus %s "%s"); COMP_CWORD=%d; _nexus;'
                        ' echo "${COMPREPLY[*]}"\n' % (
                            before, typed.replace("$", "\\$"), len(before.split()) + 1)
                        for before, typed in asked)
        found = self.run_in(BASH, "-uec", 'source "$0"; ' + lines, path).split("\n")
        self.assertEqual(len(found), len(asked) + 1)
        for (before, typed), line in zip(asked, found):
            verb = {"--home x tx send builds": "tx send", "send review-2": "send", "frobnicate": "",
                    "tx send status": "tx send"}.get(before, before)
            wanted = [word.replace("$aliases", "review-2") for word in nexus.next_words(verb)]
            self.assertEqual(line.split(), [word for word in wanted if word.startswith(typed)],
                             (before, typed))
        self.assertIn("tx serve"[3:], found[0].split())
        self.assertEqual(found[1].split(), ["poll", "poll-all", "poll-daemon", "poll-status"])
        self.assertEqual(found[2], "inbox")
        self.assertEqual(found[5:7], ["review-2"] * 2)
        self.assertNotIn("evil", os.listdir(self.home))

    def test_zsh_and_fish_understand_theirs(self):
        self.alias()
        zsh, fish = self.script("zsh"), self.script("fish")
        if shutil.which("zsh"):                 # as bashcompinit calls it, once compinit has run
            self.run_in("zsh", "-n", zsh)
            for words, wanted in (("tx in", "inbox"), ("send rev", "review-2"),
                                  ("tx ack --lease", "--lease-token")):
                found = self.run_in(
                    "zsh", "-f", "-c", "complete() :; compinit() :; bashcompinit() :; autoload() :;"
                    " source $0; emulate sh -c 'COMP_WORDS=(nexus %s); COMP_CWORD=%d; _nexus;"
                    " echo ${COMPREPLY[*]}'" % (words, len(words.split())), zsh)
                self.assertEqual(found.split(), [wanted])
        if shutil.which("fish"):
            self.run_in("fish", "-n", fish)
            for line, wanted in (("nexus tx in", ["inbox"]), ("nexus send rev", ["review-2"]),
                                 ("nexus tx ack ", ["all"]), ("nexus tx ack --lease", [
                                     "--lease-token"]), ("nexus --home x unal", ["unalias"])):
                found = self.run_in("fish", "--no-config", "-c",
                                    'source "%s"; complete -C "%s"' % (fish, line))
                self.assertEqual([each for each in found.split() if each in wanted or
                                  not each.startswith("-")], wanted, line)
        self.assertIn("bash, zsh, fish", self.no("usage", "completion", "tcsh", code=2).err)


class ChosenTools(CliCase):
    """mcp --tools."""

    def test_only_the_chosen_are_listed_and_called(self):
        for chosen, prefixes in (("tx", ["tx"]), ("nexus", ["nexus"]), ("all", ["nexus", "tx"]),
                                 (None, ["nexus", "tx"])):
            lines = "".join(json.dumps(dict(PING, id=number, method=method, params=params)) + "\n"
                            for number, (method, params) in enumerate([
                                ("tools/list", {}), ("tools/call", {
                                    "name": "nexus_sessions", "arguments": {}}), ("tools/call", {
                                        "name": "tx_channels", "arguments": {}})]))
            ran = run_nexus(self.home, "mcp", *["--tools", chosen] * bool(chosen), input=lines,
                            url=self.s.url)
            self.assertEqual(ran.code, 0, ran)
            rows = {row["id"]: row for row in map(json.loads, ran.out.splitlines())}
            names = [tool["name"] for tool in rows[0]["result"]["tools"]]
            self.assertEqual(sorted({name.partition("_")[0] for name in names}), prefixes)
            self.assertEqual(["result" in rows[1], "result" in rows[2]],
                             ["nexus" in prefixes, "tx" in prefixes])
            for number in (1, 2):
                self.assertEqual(rows[number].get("error", {"code": -32602})["code"], -32602)
        self.assertIn("nexus, tx or all", self.no("usage", "mcp", "--tools", "x", code=2).err)


# ----------------------------------------------------------------------------------------
# The server as a process
#
# 201 is a promise that kill -9 does not break; SIGTERM and Ctrl-C finish what is under way, send
# waiters home and leave one file. What keeps it from starting is one sentence, and what it logs
# tells nobody a secret.
# ----------------------------------------------------------------------------------------


class ServeCase(Case):
    """A test that starts and ends servers."""

    def begin(self, *flags, folder=None, **more):
        """A server process that the test ends itself, with end()."""
        process = Process(folder or self.folder(), *flags, **more)
        self.addCleanup(process.process.kill)
        self.assertIsNotNone(process.url)
        return process

    def end(self, process, how=signal.SIGTERM):
        """Stop it: exit 0 (if it could choose) and no traceback; returns what it wrote."""
        code, text = process.stop(how)
        self.assertEqual(code, 0 if how in (signal.SIGTERM, signal.SIGINT) else -how, text)
        self.assertNotIn("Traceback", text)
        return text

    def refused(self, *flags):
        """serve does not start: its sentence. (One that starts all the same ends at once.)"""
        def make(settings, clock=None, make_server=nexus.make_server):
            server = make_server(settings, clock)
            server.serve_forever = lambda: None
            return server
        self.addCleanup(threading.stack_size, 0)
        with patched(nexus, "make_server", make):
            ran = run_here(self.folder(), "serve", "--port", "0", *flags)
        self.assertEqual((ran.code, ran.out.count("\n")), (1, 1), ran)
        self.assertIn(ran.json["message"], ran.err)
        return ran.json["message"]


class ServeProcess(ServeCase):
    """python3 nexus.py serve."""

    @unittest.skipUnless(os.name == "posix", "signals end a process on Windows")
    def test_a_signal_finishes_what_is_under_way_within_two_seconds(self):
        for how, command in ((signal.SIGTERM, SCRIPT), (signal.SIGINT, COMMAND)):
            folder = self.folder()
            process = self.begin(folder=folder, command=command)
            client = nexus.Client(process.url)
            sid = client.create(creator_agent_id="ada")["sessionId"]
            client.messages.send("c", "kept for good")
            waiting = Started(nexus.Client(process.url).poll, sid, "ada", wait=60)
            until(lambda: client.stats()["waiters"])
            began = time.monotonic()
            self.end(process, how)
            self.assertLess(time.monotonic() - began, 10)       # 2 on a machine that is free
            self.assertEqual(waiting.result()["messages"], [])
            self.assertEqual(os.listdir(folder), ["nexus.db"])          # no WAL, no lock
            path = os.path.join(folder, "nexus.db")
            self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
            with open(path, "rb") as file:
                self.assertIn(b"kept for good", file.read())

    def test_a_signal_while_a_connection_is_begun_leaves_its_answer_alone(self):
        class Interrupted(threading.Thread):
            def start(self):
                super().start()
                raise KeyboardInterrupt     # as a signal's handler does, wherever it is called
        server = nexus.make_server(nexus.Settings({"db": ":memory:", "port": 0}))
        self.addCleanup(server.stop)
        with socket.create_connection(("127.0.0.1", server.server_port), 10) as sock:
            with patched(threading, "Thread", Interrupted), self.assertRaises(KeyboardInterrupt):
                server.handle_request()
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            self.assertEqual(sock.recv(12), b"HTTP/1.1 200")

    def test_explain_tells_each_step_and_contents_only_when_asked(self):
        secret = "hunter2" + "xyz"
        for flag in ("--explain", "--explain=all"):
            process = self.begin(flag)
            client = nexus.Client(process.url)
            made = client.create(creator_agent_id="ada")
            waiting = Started(client.poll, made["sessionId"], "ada", wait=60)
            until(lambda: b"parked" in process.written())
            client.send(made["sessionId"], "ada", "flour and password=" + secret)
            self.assertEqual(len(waiting.result()["messages"]), 1)
            client.messages.send("over", "soon", ttl_seconds=1)
            client.messages.send("jobs", "one")
            client.messages.lease("jobs", "worker", lease_seconds=1)
            with self.assertRaises(nexus.NexusError):
                client.messages.ack(99)
            self.assertEqual(len(client.messages.lease("jobs", "worker", wait=20)), 1)
            until(lambda: client.stats()["lastExpiry"]["at"])
            text = self.end(process)
            for told in (
                    r"-1 +received PUT /v1/sessions from 127\.0\.0\.1\n",
                    r"-1 +passed every check: create_session\(creator_agent_id\) may run\n",
                    r"-1 +commit 2 holds 1 write\(s\), for \w+-1; the disk had it after [0-9.]+ ms",
                    r"-1 +answered 201: \d+ bytes, [0-9.]+ ms after its head\n",
                    r"-\w+ +nothing there: parked at this session, for [456]\d\.\d s more\n",
                    r"blacked out: password\n", r"woke 1 who waited at this session\n",
                    r"answered 404, message_not_found: ", r"nexus-expiry +1 message\(s\), session",
                    r"1 lease\(s\) or delay\(s\) have ended: free again, or dead\n"):
                self.assertRegex(text, told)
            self.assertEqual("flour" in text, flag == "--explain=all")
            self.assertEqual("can read every message" in text, flag == "--explain=all")
            for hidden in (secret, made["sessionKey"]):
                self.assertNotIn(hidden, text)
        ran = run_here(self.folder(), "serve", "--explain=loud")
        self.assertEqual(ran.code, 2)
        self.assertIn("1 or 0 or all", ran.json["message"])

    def test_a_switch_in_the_environment_can_be_turned_off_by_its_flag(self):
        process = self.begin("--db", ":memory:", "--explain=0", NEXUS_EXPLAIN="1")
        nexus.Client(process.url).health()
        self.assertNotIn("received", self.end(process))

    def test_it_says_where_it_is_warns_of_a_visible_token_and_memory_leaves_no_file(self):
        folder = self.folder()
        process = self.begin("--db", ":memory:", "--token", "not-" + "secret", folder=folder)
        self.assertRegex(process.url, r"^http://127\.0\.0\.1:[1-9]\d+$")
        self.assertEqual(nexus.Client(process.url).health()["version"], nexus.VERSION)
        text = self.end(process)
        self.assertIn("serves %s (database: :memory:)" % process.url, text)
        self.assertIn("NEXUS_TOKEN", text)
        self.assertEqual(os.listdir(folder), [])

    def test_what_keeps_it_from_starting_is_one_sentence(self):
        folder = self.folder()
        process = self.begin(folder=folder)
        taken = os.path.join(folder, "nexus.db")
        other, text, path = [os.path.join(folder, name) for name in ("other.db", "text", "x.db")]
        with contextlib.closing(sqlite3.connect(other)) as db:
            db.execute("CREATE TABLE theirs (x)")
        with open(text, "w") as file:
            file.write("not a database " * 500)
        locked = self.folder()
        os.chmod(locked, 0o500)
        cases = [
            (["--db", taken], [r"\b%d\b" % process.process.pid, "--db"]),
            (["--db", ":memory:", "--port", str(process.port)], [str(process.port), "--port"]),
            (["--db", os.path.join(folder, "none", "x.db")], ["none", "--db"]),
            (["--db", folder], [folder, "--db"]), (["--db", text], [text, "damaged"]),
            (["--db", other], [other, "another program"]),
            (["--host", "0.0.0.0", "--db", path], ["--insecure", "NEXUS_TOKEN"]),
            (["--host", "192.0.2.1", "--insecure", "--db", path], ["192.0.2.1", "--port"]),
            (["--tls-cert", path + ".pem", "--db", path], [path + ".pem"]),
            (["--token-file", path + ".txt", "--db", path], ["token file"])]
        if hasattr(os, "getuid") and os.getuid() != 0:          # root may write everywhere
            cases.append((["--db", os.path.join(locked, "x.db")], ["writable", "--db"]))
        for flags, words in cases:
            with self.subTest(flags):
                said = self.refused(*flags)
                for word in words:
                    self.assertRegex(said, word)
        with open(text) as file:
            self.assertEqual(file.read(), "not a database " * 500)
        self.assertEqual(nexus.Client(process.url).health()["status"], "healthy")
        self.end(process)

    def test_every_option_has_an_environment_variable_and_the_flag_wins(self):
        seen = []
        for row in nexus.SETTINGS:
            flag, name = "--" + row.name.replace("_", "-"), nexus.environment_name(row)
            first, second = (True, True) if row.default is False else ("a", "b") \
                if row.low is None else (row.low + 7, row.low + 8)
            given = [flag] if row.default is False else [flag, second]
            for words, environ, value in (([], {}, row.default), ([], {name: ""}, row.default),
                                          ([], {name: str(first)}, first), (given, {}, second),
                                          (given, {name: str(first)}, second)):
                with patched(nexus, "serve", seen.append):
                    self.assertEqual(run_here("/", "serve", *words, **environ).code, 0)
                self.assertEqual(getattr(seen[-1], row.name), value)

    def test_a_value_that_makes_no_sense_is_exit_2_and_a_sentence(self):
        for row in nexus.SETTINGS:
            bad = ["many", str((row.low or 0) - 1), "1.5", str(2 ** 64)] \
                if row.low is not None else ["maybe"] if row.default is False else []
            for value in bad:
                with self.subTest(name=row.name, value=value), \
                        patched(nexus, "serve", lambda settings: None):
                    ran = run_here("/", "serve", **{nexus.environment_name(row): value})
                    self.assertEqual((ran.code, (ran.json or {}).get("error")), (2, "usage"))
                    self.assertIn("--" + row.name.replace("_", "-"), ran.json["message"])

    def test_the_log_tells_nobody_a_secret(self):
        token = "open-" + "sesame-1"
        process = self.begin("--verbose", NEXUS_TOKEN=token)
        client = nexus.Client(process.url, token=token)
        made = client.create(creator_agent_id="ada-lovelace", greeting="greeting-text")
        sid, pair = made["sessionId"], client.pair(made["sessionId"])
        joined = client.claim(pair["code"], "bob-secretive")
        client.send(sid, "ada-lovelace", "message-text", session_key=made["sessionKey"])
        client.poll(sid, "ada-lovelace")
        client.messages.send("channel-name", "content-text", sender="sender-name")
        client.messages.inbox("channel-name")
        for path in ("/p/" + pair["code"], "/v1/sessions/%s/x\r\nforged" % sid, "/nothing-here"):
            with contextlib.suppress(nexus.NexusError):
                client.request("GET", path)
        text = self.end(process)
        for word in (sid, made["sessionKey"], joined["sessionKey"], pair["code"], "ada-lovelace",
                     "bob-secretive", "greeting-text", "message-text", "content-text", token,
                     "channel-name", "sender-name", "nothing-here", "\nforged"):
            self.assertNotIn(word, text)
        self.assertGreaterEqual(len(re.findall(r"(?m)^\d{4}-\d\d-\d\d .* ms from ", text)), 8)
        self.assertRegex(text, r" POST \S*/messages 201 [\d.]+ ms from 127\.0\.0\.1 \S+\n")
        self.assertRegex(text, r" GET \(no such path\) 404 ")


class Sender(threading.Thread):
    """Sends numbered messages over one keep-alive socket until the server is gone.

    `place` is a channel, or the path of a session's messages. `done` holds (place, text, answer)
    of each 201; any other status is in `odd`.
    """

    def __init__(self, port, name, place, headers=""):
        super().__init__(name=name, daemon=True)
        self.place, self.done, self.odd, self._port = place, [], [], port
        path = place if headers else "/api/messages"
        self._head = "POST %s HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %%d\r\n\r\n" % (
            path, headers)
        self._body = {} if headers else {"channel": place}
        self._field = "text" if headers else "content"
        self.start()

    def run(self):
        with contextlib.suppress(OSError, ValueError), \
                socket.create_connection(("127.0.0.1", self._port), 60) as sock, \
                sock.makefile("rb") as stream:          # an answer cut off is no promise
            while not self.odd:
                text = "%s-%d" % (self.name, len(self.done))
                body = json.dumps(dict(self._body, **{self._field: text}))
                sock.sendall((self._head % len(body) + body).encode())
                head = b"".join(iter(stream.readline, b"\r\n") if stream.peek(1) else ())
                length = re.search(rb"(?i)content-length: (\d+)", head)
                if not length:
                    return
                answer = json.loads(stream.read(int(length[1])).decode())
                kind = self.done if head.split()[1] == b"201" else self.odd
                kind.append((self.place, text, answer))


class KillNine(ServeCase):
    """What was answered 201 is there exactly once, whatever happens to the process."""

    ROUNDS, CHANNELS = 5, ["c0", "c1", "c2", "c3"]

    @unittest.skipUnless(hasattr(signal, "SIGKILL"), "there is no kill -9 here")
    def test_every_201_survives_five_kills_under_load(self):
        folder, done, spans = self.folder(), [], [0]
        process = self.begin(folder=folder)
        made = [nexus.Client(process.url).create(creator_agent_id="ada") for _ in range(4)]
        doors = [(channel, "") for channel in self.CHANNELS] * 2 + [
            ("/v1/sessions/%s/messages" % row["sessionId"], "X-Agent-Id: ada\r\nX-Session-Key: %s"
             "\r\n" % row["sessionKey"]) for row in made] * 2
        for turn in range(self.ROUNDS):
            senders = [Sender(process.port, "%d-%d" % (turn, number), place, headers)
                       for number, (place, headers) in enumerate(doors)]
            until(lambda: all(sender.done or sender.odd for sender in senders), 60)
            time.sleep(0.1 * random.Random(turn).random())      # in the middle of something
            self.end(process, signal.SIGKILL)
            for sender in senders:
                sender.join(10)
                self.assertEqual(sender.odd, [])
                self.assertTrue(sender.done, "%s sent nothing" % sender.name)
                done += sender.done
            ids = [row["id"] for sender in senders[:8] for _, _, row in sender.done]
            self.assertLess(spans[-1], min(ids))        # no number comes twice, whatever was lost
            spans.append(max(ids))
            process = self.begin(folder=folder)
        client = nexus.Client(process.url)
        stored = self.stored(client, [row["sessionId"] for row in made])
        for place, text, answer in done:
            row = stored[place, text]
            self.assertEqual((row["id"], row.get("cursor")), (answer["id"], answer.get("cursor")))
        self.assertLessEqual(len(stored) - len(done), 16 * self.ROUNDS)     # those under way
        for channel in self.CHANNELS:
            client.messages.ack_all(channel)
        client.messages.gc(0)
        self.assertGreater(client.messages.send("c0", "after all is gone")["id"], spans[-1])
        self.end(process)
        if not Server.postgres:
            with contextlib.closing(sqlite3.connect(os.path.join(folder, "nexus.db"))) as db:
                self.assertEqual(db.execute("PRAGMA integrity_check").fetchall(), [("ok",)])

    def stored(self, client, sids):
        """{(place, text): message} of all there is; ids only grow, cursors have no gaps."""
        found = {}
        for channel in self.CHANNELS:
            rows = self.pages(lambda after: client.messages.inbox(channel, after, 1000), "id")
            self.assertEqual([row["id"] for row in rows], sorted({row["id"] for row in rows}))
            found.update({(channel, row["content"]): row for row in rows})
            self.assertEqual(len(rows), len({row["content"] for row in rows}))
        for sid in sids:
            rows = self.pages(lambda after: client.poll(sid, "ada", after)["messages"], "cursor")
            self.assertEqual([row["cursor"] for row in rows],
                             [str(number + 1) for number in range(len(rows))])
            self.assertTrue(all(row["verified"] for row in rows))
            found.update({("/v1/sessions/%s/messages" % sid, row["text"]): row for row in rows})
            self.assertEqual(len(rows), len({row["text"] for row in rows}))
        return found

    @staticmethod
    def pages(read, name):
        """All rows that read(after) gives, page by page."""
        rows, more = [], read(None)
        while more:
            rows += more
            more = read(more[-1][name])
        return rows


# ----------------------------------------------------------------------------------------
# Other systems
#
# What Windows and odd machines lack is taken away here, one call at a time; each has a fallback.
# ----------------------------------------------------------------------------------------


def refusing(error):
    """A function that raises this error, whatever it is called with."""
    def function(*_, **__):
        raise error
    return function


class PosixTakenAway(Case):
    """The fallbacks."""

    @contextlib.contextmanager
    def module(self, name, **attributes):
        """Importing `name` gives a module of these attributes; without any it fails."""
        before = sys.modules.get(name)
        sys.modules[name] = type(name, (), attributes) if attributes else None
        try:
            yield
        finally:
            sys.modules.pop(name)
            if before is not None:
                sys.modules[name] = before

    def test_a_database_is_locked_by_msvcrt_where_fcntl_is_missing(self):
        path, calls = os.path.join(self.folder(), "x.db"), []

        def locking(file, mode, count):
            calls.append((os.lseek(file, 0, os.SEEK_CUR), mode, count))
            if len(calls) > 1:
                raise PermissionError(13, "held by another process")
        with self.module("fcntl"), self.module("msvcrt", LK_NBLCK=2,
                                               locking=staticmethod(locking)):
            lock = nexus.FileLock(path)
            with self.assertRaises(nexus.NexusError) as caught:
                nexus.FileLock(path)
        self.assertEqual(calls, [(64, 2, 1)] * 2)       # a byte that nobody needs to read
        self.assertRegex(caught.exception.message, r"process %d\b" % os.getpid())
        with patched(os, "unlink", refusing(PermissionError(13, "it is open"))):
            lock.release()
        nexus.FileLock(path).release()                  # what could not be removed is taken over
        self.assertEqual(os.listdir(os.path.dirname(path)), [])

    def test_no_process_is_asked_for_its_life_where_asking_kills(self):
        ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
        ended.wait()
        if os.name == "posix":
            self.assertEqual((nexus.process_lives(os.getpid()), nexus.process_lives(ended.pid)),
                             (True, False))
        with patched(os, "name", "nt"), patched(os, "kill", refusing(AssertionError("killed"))):
            self.assertTrue(nexus.process_lives(ended.pid))
        with patched(os, "kill", refusing(PermissionError(1, "not yours"))):
            self.assertTrue(nexus.process_lives(1))

    def test_limits_clocks_and_modes_that_are_missing_are_done_without(self):
        settings = nexus.Settings({"max_connections": 500})

        def system(setrlimit, soft=10):
            return self.module("resource", RLIMIT_NOFILE=7, RLIM_INFINITY=-1, setrlimit=setrlimit,
                               getrlimit=staticmethod(lambda which: (soft, 100)))
        with self.module("resource"):
            nexus.raise_file_limit(settings)
        with system(refusing(ValueError("not allowed to raise maximum limit")), soft=600):
            nexus.raise_file_limit(settings)
        self.assertEqual(settings.max_connections, 500)
        with system(lambda which, limits: self.assertEqual(limits, (100, 100))):
            nexus.raise_file_limit(settings)
        self.assertEqual(settings.max_connections, 60)  # no more than there are files, less a few
        plain = type("time", (), {"time": staticmethod(time.time),
                                  "monotonic": staticmethod(time.monotonic)})
        with patched(nexus, "time", plain):
            self.assertLess(abs(nexus.Clock().now() / 1000 - time.time()), 5)
        state = nexus.State(self.folder())
        state.put("s", "key", "k")
        os.chmod(os.path.join(state.root, "sessions", "s", "key"), 0o666)
        with patched(os, "name", "nt"):
            self.assertTrue(state.key_is_private("s"))

    def test_windows_binds_the_port_for_itself_alone(self):
        socket.SO_EXCLUSIVEADDRUSE = socket.SO_KEEPALIVE        # stands in for what we lack
        try:
            server = self.server().server
        finally:
            del socket.SO_EXCLUSIVEADDRUSE
        self.assertTrue(server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))


# ----------------------------------------------------------------------------------------
# README and the file itself
#
# What README shows is run, what it lists is compared with the code, and the marks of the single
# file are measured.
# ----------------------------------------------------------------------------------------


# A script that is called nexus.py runs as COMMAND does.
PYTHON3 = """python3() { if [ "$1" = nexus.py ]; then "$@"; else "$PYTHON" "$@"; fi; }
"""


class ReadmeTellsTheTruth(Case):
    """README.md, run.

    Each ```sh or ```bash block that calls python3, nexus.py or curl is one bash script; all run in
    order, in one fresh folder with one fresh home. The default server runs meanwhile, on another
    port: 3456 is replaced by it. A line that serves or tests (serve, selftest, test_nexus.py) is
    only parsed. `<!-- not run: why -->` just before a block skips it.
    """

    BLOCK = re.compile(r"^(?:<!-- not run: (.*?) -->\n+)?```(?:sh|bash)\n(.*?)^```", re.M | re.S)
    CALL = re.compile(r"^(?:\w+=\S+ |\w+=\"?\$\()*(?:python3|nexus\.py|curl)\b", re.M)
    ELSEWHERE = re.compile(r"^(?:\w+=\S+ )*python3 (nexus\.py (serve|selftest)|test_nexus\.py).*$",
                           re.M)

    def setUp(self):
        if not os.path.exists(README):
            self.skipTest("README.md is not there")
        with open(README, encoding="utf-8") as file:
            self.text = file.read()

    def test_the_first_screen_shows_the_two_commands(self):
        screen = "\n".join(self.text.splitlines()[:29])
        self.assertRegex(screen, r"(?m)^python3 nexus\.py serve\b")
        self.assertRegex(screen, r"(?m)^python3 test_nexus\.py\b")

    def test_its_table_names_every_setting_with_its_default(self):
        rows = [line for line in self.text.splitlines() if line.startswith("|")]
        for row in nexus.SETTINGS:
            flag = "--" + row.name.replace("_", "-")
            found = [line for line in rows if re.search(r"`%s[` ]" % flag, line)]
            self.missing([flag][bool(found):], "README's table of options has no row for %s.")
            if row.default not in (None, False):
                value = r"(?<![\w.])%s(?![\w.])" % re.escape(str(row.default))
                self.assertRegex("\n".join(found), value)

    @unittest.skipUnless(BASH, "bash is missing")
    def test_its_hook_hands_the_news_to_the_model_once(self):
        hook, = [json.loads(text) for text in re.findall(r"(?ms)^```json\n(.*?)^```", self.text)
                 if "hooks" in text]
        command = hook["hooks"]["Stop"][0]["hooks"][0]["command"]
        server, home = self.server(), self.folder()
        sid = run_nexus(home, "create", "--creator-agent-id", "ada", "--alias", "review",
                        url=server.url).json["sessionId"]
        server.call("POST", "/v1/sessions/%s/join" % sid, agent="bob")
        for run, text, code in (("r1", "", 0), ("r1", "one", 2), ("r1", "", 0), ("r2", "", 2),
                                ("r1", "two", 2)):
            if text:
                server.send(sid, "bob", text)
            done = subprocess.run(
                [BASH, "-c", PYTHON3 + IN_BASH + command.replace("/path/to/", "")], cwd=home,
                input=b'{"session_id": "%s", "hook_event_name":"Stop"}' % run.encode(),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
                env=clean_environment(home, PYTHON=sys.executable))
            self.assertEqual((done.returncode, done.stdout), (code, b""), done.stderr)
            self.assertEqual(b"review: " in done.stderr, code == 2, done.stderr)

    @unittest.skipUnless(BASH and shutil.which("curl"), "bash or curl is missing")
    def test_its_commands_run(self):
        folder = self.folder()
        shutil.copy(NEXUS, folder)
        server = self.process(folder=folder)
        environ = clean_environment(os.path.join(folder, "home"), NEXUS_URL=server.url,
                                    PYTHON=sys.executable)
        os.mkdir(environ["HOME"])
        for reason, script in self.BLOCK.findall(self.text):
            with self.subTest(script):
                if not self.CALL.search(script):
                    continue
                for tool in re.findall(r"\b(?:jq|openssl)\b", script):
                    reason = reason or not shutil.which(tool) and tool + " is missing"
                if reason:
                    self.skipTest(reason)
                script = self.ELSEWHERE.sub(self.checked, script)
                script = script.replace("3456", str(server.port))
                done = subprocess.run(
                    [BASH, "-ec", IN_BASH + PYTHON3 + script],
                    cwd=folder, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, timeout=60)
                self.assertEqual(done.returncode, 0, done)

    @staticmethod
    def checked(match):
        """A line that is not run, but must be right."""
        if match[2]:
            words = nexus.shlex.split(match[0].rstrip("& "), comments=True)
            parsed_words(words[words.index(match[2]):])
        return ":"


class FileMarks(unittest.TestCase):
    """nexus.py as a text."""

    @classmethod
    def setUpClass(cls):
        cls.ast = __import__("ast")
        with open(NEXUS, encoding="utf-8") as file:
            cls.text = file.read()
        cls.nodes = list(cls.ast.walk(cls.ast.parse(cls.text)))

    def test_the_map_at_the_top_equals_the_banners(self):
        drawn = re.findall(r"(?m)^ +(\d+)\. (.+?)  ", nexus.__doc__)
        banners = re.findall(r"(?m)^# -{80,}\n# (\d+)\. (.+)\n#\n", self.text)
        self.assertEqual(drawn, banners)
        self.assertEqual([int(number) for number, _ in drawn], list(range(1, len(drawn) + 1)))
        self.assertEqual(len(re.findall(r"(?m)^# -{80,}$", self.text)), 2 * len(banners))

    @unittest.skipUnless(hasattr(sys, "stdlib_module_names"), "needs Python 3.10")
    def test_only_the_standard_library_is_imported(self):
        names = {alias.name for node in self.nodes if isinstance(node, self.ast.Import)
                 for alias in node.names}
        names |= {node.module for node in self.nodes if isinstance(node, self.ast.ImportFrom)}
        names |= {node.args[0].value for node in self.nodes if isinstance(node, self.ast.Call)
                  and getattr(node.func, "id", "") == "Later"}
        self.assertLessEqual({"json", "sqlite3"}, names)
        self.assertEqual({name.partition(".")[0] for name in names}
                         - set(sys.stdlib_module_names), {"psycopg"})
        drivers = [node for node in self.nodes if isinstance(node, self.ast.FunctionDef)
                   and "import psycopg" in self.ast.unparse(node)]     # nobody else needs it
        self.assertEqual([node.name for node in drivers], ["load_psycopg"])

    def test_no_line_is_longer_than_100_and_no_function_longer_than_60(self):
        for path in (NEXUS, os.path.abspath(__file__)):
            with open(path, encoding="utf-8") as file:
                long = [number for number, line in enumerate(file, 1) if len(line) > 101]
            self.assertEqual(long, [], path)
        self.assertEqual([node.name for node in self.nodes if isinstance(
            node, self.ast.FunctionDef) and node.end_lineno - node.lineno >= 60], [])


# ----------------------------------------------------------------------------------------
# Who may do what
#
# The table in README is the specification: each of its cells is tried against a server that has a
# token, and a cell that says no must be a refusal for a reason of authority.
# ----------------------------------------------------------------------------------------


class WhoMayDoWhat(ServerCase):
    """README's table, cell by cell."""

    SETTINGS = {"token": "t0ken-" + "of-the-server"}
    BODIES = {"POST /v1/sessions/:id/messages": {"text": "hi"}, "POST /api/messages": {
        "channel": "c", "content": "x"}, "POST /mcp": {"jsonrpc": "2.0", "id": 1, "method": "ping"}}

    def rows(self):
        with open(README, encoding="utf-8") as file:
            table = file.read().partition("## Who may do what")[2].partition("\n## ")[0]
        for line in re.findall(r"(?m)^\| `.*$", table):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            yield cells[0].strip("`"), [cell.startswith("yes") for cell in cells[1:]]

    def ask(self, call, role):
        """One call in one role, on a session of its own: the Answer."""
        opened = self.s.call("PUT", "/v1/sessions", {"creatorAgentId": "boss"},
                             headers={"X-Api-Key": self.SETTINGS["token"]}).json
        session, agent, key, headers = opened["sessionId"], None, None, {}
        member = self.s.call("POST", "/v1/sessions/%s/join" % session, agent="bob").json
        if role in ("stranger", "token"):
            session = "0" * 48
        if role in ("name", "key"):
            agent = "bob"
        if role == "creator":
            agent = "boss"
        key = {"key": member["sessionKey"], "creator": opened["sessionKey"]}.get(role)
        if role == "token":
            headers["Authorization"] = "Bearer " + self.SETTINGS["token"]
        if "/join" in call:
            agent = agent and agent + "-2"      # a member is in already; another may come
        method, path = call.split()
        path = path.replace(":id", session).replace(":agent", agent or "bob").replace(
            ":channel", "c")
        body = self.BODIES.get(call)
        if path == "/v1/pair":
            body = {"sessionId": session}
        if agent is None:
            agent = "mallory"
        return self.s.call(method, path, body, agent, key, headers)

    def test_every_cell(self):
        roles = ("stranger", "id", "name", "key", "creator", "token")
        count = 0
        for call, cells in self.rows():
            self.assertEqual(len(cells), len(roles), call)
            for role, allowed in zip(roles, cells):
                with self.subTest(call=call, role=role):
                    answer = self.ask(call, role)
                    self.assertEqual(answer.status < 400, allowed, answer.text)
                    if not allowed:
                        self.assertIn(answer.status, (401, 403, 404), answer.text)
                    count += 1
        self.assertGreater(count, 80)

    def test_everything_of_door_2_is_guarded(self):
        for entry in nexus.OPERATIONS:
            if entry.path and entry.path.startswith("/api/"):
                path = re.sub(r"{\w+}", "1", entry.path)
                with self.subTest(path):
                    self.expect(self.s.call(entry.method, path, {}), 401, "unauthorized")


# ----------------------------------------------------------------------------------------
# Under pressure
#
# Strangers are cheap: what the head alone can refuse is refused before the body is read, bodies
# and connections have bounds, and nobody who is slow, or in the middle of something, stops others.
# ----------------------------------------------------------------------------------------

def request(method, path, body=b"", *lines):
    """The bytes of a request; a Content-Length among the lines stands as it is."""
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        lines += ("Content-Length: %d" % len(body),)
    return "\r\n".join(("%s %s HTTP/1.1" % (method, path), "Host: localhost") + lines
                       + ("", "")).encode() + body


class Talk:
    """A connection of one's own: say() some bytes, hear() the next answer."""

    def __init__(self, case, server, *said):
        self._sock = socket.create_connection(("127.0.0.1", server.port), 10)
        case.addCleanup(self._sock.close)
        self._stream = self._sock.makefile("rb")
        case.addCleanup(self._stream.close)
        self.say(*said)

    def say(self, *parts):
        for part in parts:
            self._sock.sendall(part)
        return self

    def hear(self):
        """The next answer, or None at the end of the stream."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            line = self._stream.readline()
            if not line:
                return None
            head += line
        length = int(re.search(rb"Content-Length: (\d+)", head).group(1))
        return answers(head + self._stream.read(length))[0]


class UnderPressure(Case):

    POST = "/api/messages"
    SEND = b'{"channel": "c", "content": "x"}'

    def connection(self, server):
        """The server's side of the one connection that it has."""
        until(lambda: len(server.server.connections) == 1)
        return next(iter(server.server.connections))

    def test_a_body_is_not_read_before_the_head_is_found_good(self):
        server = self.server(token="t")
        sid, keys = server.call("PUT", "/v1/sessions", {"creatorAgentId": "ada"},
                                headers={"X-Api-Key": "t"}).json["sessionId"], {}
        mine, size = "/v1/sessions/%s/messages" % sid, "Content-Length: 1000000"
        for path, lines, status in (
                (self.POST, (), 401), ("/nowhere", (), 404), ("/health", (), 405),
                (self.POST, ("X-Api-Key: t", "Content-Type: text/plain"), 415), (mine, (), 400),
                ("/v1/sessions/%s/messages" % UNKNOWN, ("X-Agent-Id: ada",), 404),
                (mine, ("X-Agent-Id: eve",), 403),
                ("/v1/sessions/%s/renew" % sid, ("X-Agent-Id: eve",), 403),
                (mine, ("X-Agent-Id: ada", "X-Session-Key: wrong"), 403)):
            with self.subTest(path=path, lines=lines):
                talk = Talk(self, server, request("POST", path, b"", size, *lines))
                self.assertEqual(talk.hear().status, status)
                self.assertIsNone(talk.hear())
        for path, status in ((self.POST, 401), ("/v1/sessions/%s/messages" % UNKNOWN, 404)):
            chunked = request("POST", path, b"", "Transfer-Encoding: chunked", "X-Agent-Id: ada")
            self.assertEqual(Talk(self, server, chunked).hear().status, status)
        # A body that is here already costs nothing: the connection stays.
        talk = Talk(self, server, request("POST", self.POST, self.SEND) + get("/health"))
        self.assertEqual([talk.hear().status, talk.hear().status], [401, 200])

    def test_a_long_body_from_a_stranger_is_not_redacted(self):
        server = self.server()
        body = json.dumps({"json": ["x" * 9] * 1000}).encode()
        self.assertGreater(len(body), nexus.CHEAP_BODY)
        with patched(nexus, "redact_json", None):
            answer = server.call("POST", "/v1/sessions/%s/messages" % UNKNOWN, body, "ada")
        self.expect(answer, 404, "session_not_found")

    def test_unfinished_bodies_have_a_bound_in_all(self):
        server = self.server(max_buffered=70000)
        head = request("POST", self.POST, b"", "Content-Length: 60000")
        first = Talk(self, server, head)
        until(lambda: server.app.requests)          # what comes with the head does not count
        first.say(b"x" * 59999)
        until(lambda: server.server.held == 59999)
        second = Talk(self, server, head, b"x" * 59999)
        self.assertEqual(second.hear().status, 503)
        self.assertEqual(server.app.refused["server_busy"], 1)
        small = server.call("POST", self.POST, {"channel": "c", "content": "x"})
        self.expect(small, 201)
        self.assertEqual(first.say(b"x").hear().status, 400)
        until(lambda: server.server.held == 0)

    def test_chunks_count_like_any_body(self):
        server = self.server(max_buffered=20000)
        talk = Talk(self, server, request("POST", self.POST, b"", "Transfer-Encoding: chunked"))
        until(lambda: self.connection(server).busy)
        talk.say(b"2\r\nxx\r\n" * 6000)
        self.assertEqual(talk.hear().status, 503)
        until(lambda: server.server.held == 0)

    def test_the_connections_of_one_address_have_a_bound(self):
        server = self.server(max_connections=8, max_connections_per_address=2)
        talks = [Talk(self, server, get("/health")) for _ in range(2)]
        self.assertEqual([talk.hear().status for talk in talks], [200, 200])
        self.assertEqual(Talk(self, server).hear().status, 503)
        try:
            sock = socket.create_connection(("127.0.0.1", server.port), 10, ("127.0.0.2", 0))
        except OSError as trouble:
            self.skipTest("this machine has one loopback address: %s" % trouble)
        with sock:
            sock.sendall(get("/health"))
            self.assertIn(b" 200 ", sock.recv(999))
        talks[0]._sock.shutdown(socket.SHUT_RDWR)
        until(lambda: server.server.addresses["127.0.0.1"] == 1)
        self.assertEqual(Talk(self, server, get("/health")).hear().status, 200)

    def test_an_address_gets_a_quarter_and_loopback_all(self):
        for peer, least in (("10.0.0.7", 2), ("2001:db8::1", 2), ("127.0.0.1", 8)):
            server = self.server(max_connections=8).server
            found = [server._admit(nexus.Connection(None, peer, server)) for _ in range(9)]
            server.connections.clear()
            self.assertEqual(found, [True] * least + [False] * (9 - least))

    def test_a_stop_waits_for_a_request_that_begins_while_an_answer_is_written(self):
        server = self.server()
        talk, go = Talk(self, server), threading.Event()
        holding = Started(server.store.db._alone, lambda: go.wait(10))
        connection = self.connection(server)
        talk.say(request("POST", self.POST, self.SEND))
        until(lambda: connection.busy)
        talk.say(get("/health")[:20])
        until(lambda: connection.begun)
        go.set()
        self.assertEqual(talk.hear().status, 201)
        self.assertTrue(connection.busy)
        stopping = Started(server.stop)
        until(lambda: server.server.stopping)
        talk.say(get("/health")[20:])
        self.assertEqual(talk.hear().status, 200)
        holding.result(), stopping.result()

    def test_an_answer_that_nobody_reads_holds_up_no_commit(self):
        server = self.server()
        talk, go = Talk(self, server), threading.Event()
        holding = Started(server.store.db._alone, lambda: go.wait(10))
        talk.say(request("POST", self.POST, self.SEND))
        until(lambda: len(server.store.db._queue) == 1)
        with patched(nexus, "_status_line", lambda *_: b"x" * (1 << 24)):
            go.set()
            holding.result()            # who commits has written the answer, as far as it went
        self.expect(server.call("POST", self.POST, {"channel": "c", "content": "y"}), 201)
        self.assertTrue(self.connection(server).busy)

    def test_who_takes_an_answer_too_slowly_is_cut_off(self):
        server = self.server()
        with patched(nexus, "_status_line", lambda *_: b"x" * (1 << 24)), \
                patched(nexus, "BODY_SECONDS", 0.05), patched(nexus, "SLOWEST_CLIENT", 1 << 30), \
                patched(nexus, "TICK_SECONDS", 1):
            talk = Talk(self, server, get("/health"))
            until(lambda: server.app.requests)
            until(lambda: not server.server.connections)
            heard = 0
            while talk._sock.recv(1 << 20):
                heard += 1
        self.assertLess(heard, 1 << 24)

    def test_between_two_requests_a_connection_is_idle(self):
        server = self.server()
        talk = Talk(self, server, get("/health"))
        self.assertEqual(talk.hear().status, 200)
        until(lambda: not self.connection(server).busy)

    def test_a_fault_after_the_commit_reaches_who_waits(self):
        database = nexus.Database(":memory:")
        self.addCleanup(database.close)
        with self.assertRaises(ZeroDivisionError):
            nexus.Pending(database, lambda db: 0, lambda found: 1 // found).wait()
        self.assertEqual(nexus.Pending(database, lambda db: 4).to(str).wait(), "4")

    def test_a_body_that_came_with_its_head_is_not_asked_for(self):
        raw = request("POST", self.POST, self.SEND, "Expect: 100-continue", "Connection: close")
        self.assertEqual([answer.status for answer in answers(self.server().raw(raw))], [201])

    def test_a_trusted_proxy_says_who_asks(self):
        server = self.server(trust_proxy=True, verbose=True)
        lines = [(), ("X-Forwarded-For: 10.9.9.9, 10.0.0.5",)]
        for number, forwarded in enumerate(lines, 1):
            Talk(self, server, get("/health", *forwarded)).hear()
            until(lambda: len(server.lines) == number)      # it may come after the answer
        self.assertEqual([line.split()[-2] for line in server.lines], ["127.0.0.1", "10.0.0.5"])
        talk = Talk(self, server, get("/health", *lines[1]) * 100)
        found = [talk.hear().status for _ in range(100)]
        self.assertEqual((found.count(200), found.count(429)), (99, 1))
        until(lambda: len(server.lines) == 102)
        server.lines.clear()

    def test_what_queues_while_somebody_else_holds_the_writer_is_committed(self):
        server, go = self.server(), threading.Event()
        holding = Started(server.store.db._alone, lambda: go.wait(10))
        until(lambda: server.store.db._writer_lock.locked())
        sends = [Started(server.call, "POST", self.POST, {"channel": "c", "content": "x"})
                 for _ in range(3)]
        until(lambda: len(server.store.db._queue) == 3)
        go.set()
        holding.result()
        self.assertEqual([send.result().status for send in sends], [201] * 3)

    def test_a_refused_body_that_is_here_whole_ends_no_connection(self):
        server = self.server(token="t")
        talk = Talk(self, server, request("POST", self.POST, self.SEND))
        self.assertEqual(talk.hear().status, 401)
        self.assertEqual(talk.say(get("/health")).hear().status, 200)

    def test_a_head_may_be_as_long_as_it_is_said_and_no_longer(self):
        server = self.server(max_header_bytes=512)
        for more, status in ((0, 200), (1, 431)):
            head = get("/health", "X: ")[:-4]
            head += b"x" * (512 + more - len(head)) + b"\r\n\r\n"
            self.assertEqual(Talk(self, server, head).hear().status, status)

    def test_a_system_without_threads_to_give_refuses_and_forgets(self):
        server = self.server()
        with patched(threading.Thread, "start", refusing(RuntimeError())):
            self.assertEqual(server.call("GET", "/health").status, 503)
        self.assertEqual((server.server.connections, dict(server.server.addresses)), (set(), {}))

    def test_who_is_in_the_middle_of_a_body_does_not_hold_up_the_end(self):
        server = self.server()
        with patched(nexus, "TICK_SECONDS", 1):
            Talk(self, server, get("/mcp", "Content-Length: 9").replace(b"GET", b"POST", 1))
            until(lambda: server.app.requests)
        server.stop(20)
        self.assertEqual(server.server.connections, set())

    def test_a_request_that_waits_for_its_turn_is_under_way(self):
        server = self.server()
        talk = Talk(self, server, get("/health"))
        connection, busy = self.connection(server), []
        talk.hear()
        until(lambda: not connection.busy)

        class Turn:
            """A lock that looks around before it is taken."""
            lock = connection._turn
            locked, release = lock.locked, lock.release

            def acquire(self, *args, **values):
                busy.append(connection.busy)
                return self.lock.acquire(*args, **values)
        connection._turn = Turn()
        self.assertEqual(talk.say(get("/health")).hear().status, 200)
        self.assertEqual(busy[0], True)

    def test_names_of_this_machine_that_strangers_make_up_fill_no_memory(self):
        server = self.server()
        with patched(nexus, "GOOD_HOSTS", 2):
            for number in range(4):
                self.assertEqual(server.call("GET", "/health", headers={
                    "Host": "10.0.0.%d" % number}).status, 200)
        self.assertEqual(len(server.app.good_hosts), 2)

    def test_who_finds_the_port_taken_gives_the_database_free(self):
        path = os.path.join(self.folder(), "x.db")
        settings = nexus.Settings({"db": path, "port": self.server().port})
        with self.assertRaisesRegex(nexus.NexusError, "Cannot listen"):
            nexus.make_server(settings)
        self.assertFalse(os.path.exists(path + ".lock"))

    def test_addresses_are_forgotten_when_their_minute_is_over_and_no_earlier(self):
        clock = TestClock()
        budget = nexus.Budget(1, 60, clock)
        with patched(nexus, "BUDGET_KEYS", 2):
            for key in "abc":
                self.assertEqual(budget.spend(key)[0], 0)
                clock.advance(25)
            self.assertGreater(budget.spend("b")[0], 0)
            self.assertEqual(budget.spend("d")[0], 0)
        self.assertEqual(set(budget._windows), set("bcd"))

    def test_who_resets_a_connection_waits_no_longer(self):
        server = self.server()
        talk = Talk(self, server, get("/api/messages/inbox/c?wait=60"))
        until(lambda: server.store.waiters.parked)
        talk._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        talk._stream.close()
        talk._sock.close()
        until(lambda: not server.store.waiters.parked)

    def test_the_watchman_lets_go_of_nobody_elses_bell(self):
        watchman, bells = nexus.Watchman(), (nexus.Bell(), nexus.Bell())
        self.addCleanup(watchman.close)
        near, far = socket.socketpair()
        self.addCleanup(near.close)
        watchman.watch(near, bells[0])
        watchman.unwatch(near, bells[1])
        far.close()
        bells[0].wait(10)
        self.assertTrue(bells[0].gone)

    def test_one_long_body_at_a_time(self):
        server = self.server()
        body = {"channel": "c", "content": "x" * nexus.LONG_BODY}
        with server.app.long_work:
            long_ones = [Started(server.call, "POST", self.POST, body) for _ in range(2)]
            self.expect(server.call("POST", self.POST, {"channel": "c", "content": "y"}), 201)
            self.assertFalse(any(call.done() for call in long_ones))
        self.assertEqual([call.result().status for call in long_ones], [201, 201])

    def test_chunk_heads_and_trailers_are_as_strict_as_heads(self):
        server = self.server()
        for extension, trailer, status in (
                (b";a=b", b"X-Sum: 1\r\n", 201), (b";a\nb", b"", 400), (b";a\0b", b"", 400),
                (b";a\rb", b"", 400), (b"", b"X\r\n", 400), (b"", b"X : 1\r\n", 400),
                (b"", b"X: a\nY: b\r\n", 400), (b"", b"X: \0\r\n", 400)):
            with self.subTest(extension=extension, trailer=trailer):
                body = b"20%s\r\n%s\r\n0\r\n%s\r\n" % (extension, self.SEND, trailer)
                talk = Talk(self, server, request("POST", self.POST, body,
                                                  "Transfer-Encoding: chunked"))
                self.assertEqual(talk.hear().status, status)

    def test_close_is_a_word_and_not_a_part_of_one(self):
        talk = Talk(self, self.server(), get("/health", "Connection: disclose") * 2
                    + get("/health", "Connection: x, Close"))
        self.assertEqual([talk.hear().status for _ in range(3)] + [talk.hear()], [200] * 3 + [None])

    def test_the_other_kind_of_http_is_told_so_at_once(self):
        folder, server = self.folder(), self.server()
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
        self.assertIn("http://", Talk(self, server, hello).hear().json["message"])
        if not shutil.which("openssl"):
            self.skipTest("openssl is not here")
        subprocess.run(("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
                        " -days 9 -subj /CN=x -keyout k.pem -out c.pem").split(), cwd=folder,
                       check=True, stderr=subprocess.DEVNULL)
        server = self.server(tls_cert=os.path.join(folder, "c.pem"),
                             tls_key=os.path.join(folder, "k.pem"))
        answer = Talk(self, server, get("/health")).hear()
        self.assertEqual(answer.status, 400)
        self.assertIn("https://", answer.json["message"])
        with patched(nexus, "HEAD_SECONDS", 0.05):
            self.assertIsNone(Talk(self, server).hear(), "who says nothing is not waited for")

    def test_the_log_tells_of_every_refusal_and_metrics_count_them(self):
        server = self.server(verbose=True, max_body=1000)
        for number, ask in enumerate((      # a line may come after the answer
                lambda: server.call("POST", self.POST, b"x" * 1001),
                lambda: server.raw(b"GARBAGE\r\n\r\n"),
                lambda: server.call("DELETE", self.POST),
                lambda: server.call("POST", self.POST, {"channel": "c", "content": TOKEN})), 1):
            ask()
            until(lambda: len(server.lines) == number)
        lines = [" ".join(line.split()[:3]) for line in server.lines]
        server.lines.clear()
        self.assertEqual(lines, ["POST /api/messages 413", "- (not HTTP)", "DELETE /api/messages"
                                 " 405", "POST /api/messages 201"])
        text = server.call("GET", "/metrics").text
        until(lambda: server.lines)
        server.lines.clear()
        for line in ("# TYPE nexus_refused counter", 'nexus_refused{code="bad_request"} 1',
                     'nexus_refused{code="payload_too_large"} 1', "nexus_redactions 1"):
            self.assertIn(line + "\n", text)

    def test_a_log_that_nobody_reads_stops_nobody(self):
        reading, writing = os.pipe()
        logger, errors, heard = nexus.Log(), sys.stderr, b""
        with open(reading, "rb"), open(writing, "w") as sys.stderr, \
                patched(nexus, "LOG_LINES", 100):
            try:
                os.set_blocking(writing, False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(writing, b"." * 4096)
                os.set_blocking(writing, True)
                logger.start()
                logger("line 0 x")
                until(lambda: logger._lines.empty())    # its thread waits for the reader
                for number in range(1, 301):
                    logger("line %d x" % number)
                self.assertEqual((logger._lines.qsize(), logger._lost), (100, 200))
                while b"200 lines of this log were lost" not in heard:
                    heard += os.read(reading, 65536)
                logger("the end")
                logger.stop()
                while b"the end" not in heard:
                    heard += os.read(reading, 65536)
            finally:
                sys.stderr = errors
        self.assertEqual(len(re.findall(rb"line \d+ x", heard)), 101)


# ----------------------------------------------------------------------------------------
# Many at once, and what comes next
#
# A batch is one commit: all of it or nothing. Acks in one request succeed or fail one by one. Who
# follows sees everything once, in order, through whatever happens to the server.
# ----------------------------------------------------------------------------------------

class ManyAtOnce(ChannelCase):

    BATCH, ACKS = "/api/messages/batch", "/api/messages/ack"

    def batch(self, *messages):
        return self.s.call("POST", self.BATCH, {"messages": list(messages)})

    def test_a_batch_is_stored_in_order_in_one_commit_each_as_after_a_send(self):
        before = self.s.store.db.commits
        rows = self.expect(self.batch(
            {"channel": self.channel, "content": "a", "sender": "me", "ttlSeconds": 9,
             "metadata": {"k": 1}, "correlationId": "c", "taskId": "t"},
            {"channel": self.channel + "2", "content": "password=" + "hunter2xyz"},
            {"channel": self.channel, "content": "b"}), 201)
        self.assertEqual((rows["count"], self.s.store.db.commits), (3, before + 1))
        first, second, third = rows["messages"]
        self.assertEqual([row["id"] - first["id"] for row in (second, third)], [1, 2])
        self.assertEqual(self.read(), [first, third])
        self.assertEqual((first["sender"], third["sender"], first["taskId"], first["metadata"]),
                         ("me", "api", "t", {"k": 1}))
        self.assertEqual(second["redacted"], ["password"])
        self.assertEqual((self.count(), self.count(self.channel + "2")), (2, 1))

    def test_one_fault_and_nothing_is_stored_and_all_faults_are_told(self):
        answer = self.batch({"channel": self.channel, "content": "x"}, {"channel": ""}, 7,
                            {"channel": "c", "content": "x", "ttlSeconds": 0, "sender": None})
        self.assertEqual(self.faults(answer), names(
            "messages[1].channel messages[1].content messages[2] messages[3].ttlSeconds"
            " messages[3].sender"))
        for body in ({}, {"messages": {}}, {"messages": []},
                     {"messages": [{"channel": "c", "content": "x"}] * 1001}):
            self.assertEqual(self.faults(self.s.call("POST", self.BATCH, body)), {"messages"})
        self.assertEqual(self.count(), 0)
        self.put("first", key="k")
        refused = self.batch({"channel": self.channel, "content": "x"},
                             {"channel": self.channel, "content": "other", "idempotencyKey": "k"})
        self.expect(refused, 409, "idempotency_key_reused")
        self.assertEqual(self.count(), 1)

    def test_a_repeated_batch_stores_what_is_missing_and_answers_the_same(self):
        rows = [{"channel": self.channel, "content": str(n), "idempotencyKey": "b:%d" % n}
                for n in range(4)]
        first = self.expect(self.batch(*rows[:2]), 201)["messages"]
        again = self.expect(self.batch(*rows, rows[3]), 201)["messages"]
        self.assertEqual((again[:2], again[3]["id"], self.count()), (first, again[4]["id"], 4))

    def test_who_waits_is_woken_by_a_batch(self):
        call = self.parked(self.read, "?wait=20")
        self.batch({"channel": self.channel, "content": "x"})
        self.assertEqual(len(call.result()), 1)

    def test_more_acks_than_one_statement_takes_are_done_all(self):
        acks = [{"id": self.put()["id"]} for _ in range(2 * nexus.GROUP + 1)]
        self.assertEqual(self.s.call("POST", "/api/messages/ack", {"acks": acks}).json["acked"],
                         len(acks))
        self.assertEqual(self.ids("?limit=100"), [])

    def test_large_batches_do_not_pile_up_in_one_commit(self):
        go = threading.Event()
        holding = Started(self.s.store.db._alone, lambda: go.wait(10))
        until(lambda: self.s.store.db._writer_lock.locked())
        before = self.s.store.db.commits
        sends = [Started(self.batch, *[{"channel": self.channel, "content": "x"}] * 64)
                 for _ in range(2)]
        until(lambda: len(self.s.store.db._queue) == 2)
        go.set()
        self.assertEqual([send.result().status for send in sends], [201, 201])
        holding.result()
        self.assertEqual(self.s.store.db.commits - before, 2)

    def test_many_acks_fill_a_commit_as_many_messages_do(self):
        acks = [{"id": self.put()["id"]} for _ in range(nexus.MAX_BATCH)]
        before, database = self.s.store.db.commits, self.s.store.db
        with one_commit(database) as queued:
            calls = []
            for number in (1, 2):
                calls.append(Started(self.s.store.channels.ack_many, acks))
                queued(number)
            calls.append(Started(self.put))
            queued(3)
        self.assertEqual([each["ok"] for each in calls[0].result()], [True] * len(acks))
        self.assertEqual([each["ok"] for each in calls[1].result()], [False] * len(acks))
        calls[2].result()
        self.assertEqual(database.commits - before, 2)

    def test_acks_succeed_one_by_one_and_say_why_not(self):
        ids = [self.put(str(n))["id"] for n in range(3)]
        leased, = self.lease()
        found = self.expect(self.s.call("POST", self.ACKS, {"acks": [
            {"id": ids[1]}, {"id": ids[1]}, {"id": 10 ** 9}, {"id": ids[2], "leaseToken": "wrong"},
            {"id": leased["id"], "leaseToken": leased["leaseToken"]}]}), 200)
        self.assertEqual([(row["id"], row["ok"], row.get("error")) for row in found["results"]], [
            (ids[1], True, None), (ids[1], False, "message_already_acked"),
            (10 ** 9, False, "message_not_found"), (ids[2], False, "lease_expired"),
            (leased["id"], True, None)])
        self.assertEqual((found["acked"], self.ids(), self.count()), (2, [ids[2]], 1))
        for body in ({}, {"acks": []}, {"acks": [{"id": 1}] * 1001}):
            self.assertEqual(self.faults(self.s.call("POST", self.ACKS, body)), {"acks"})
        answer = self.s.call("POST", self.ACKS, {"acks": [{"id": "x"}, {"leaseToken": ""}]})
        self.assertEqual(self.faults(answer),
                         names("acks[0].id acks[1].id acks[1].leaseToken"))

    def test_a_lease_finishes_the_last_and_takes_the_next_in_one_commit(self):
        self.put("one"), self.put("two")
        first, = self.lease()
        before = self.s.store.db.commits
        answer = self.s.call("POST", self.at("/lease"), {"consumer": "w", "acks": [
            {"id": first["id"], "leaseToken": first["leaseToken"]}]}).json
        self.assertEqual([row["content"] for row in answer["messages"]], ["two"])
        self.assertEqual(answer["results"], [{"id": first["id"], "ok": True}])
        self.assertEqual((self.s.store.db.commits - before, self.count()), (1, 1))

    def test_the_acks_of_a_lease_do_not_wait_for_the_next_message(self):
        self.put()
        first, = self.lease()
        call = self.parked(self.lease, wait=20, acks=[{"id": first["id"],
                                                       "leaseToken": first["leaseToken"]}])
        until(lambda: self.count() == 0)
        second = self.put()
        self.assertEqual([row["id"] for row in call.result()], [second["id"]])

    def test_channels_are_listed_by_name_with_what_is_in_them(self):
        here, there = self.channel + "/a", self.channel + "/b"
        for channel in (there, here, here, here):
            self.put(channel=channel)
        first = self.ids(channel=here)[0]
        self.act(first, "ack")
        self.s.call("POST", self.at("/lease", here), {"consumer": "w", "leaseSeconds": 9})
        self.put(channel=there, ttlSeconds=1)
        path = "/api/channels?prefix=" + nexus.percent(self.channel)
        found = self.expect(self.s.call("GET", path), 200)
        rows = {row["channel"]: row for row in found["channels"]}
        self.assertEqual((list(rows), found["count"], found["more"]), ([here, there], 2, False))
        self.assertEqual([rows[here][name] for name in ("pending", "leased", "dead")], [2, 1, 0])
        self.assertEqual(rows[there]["pending"], 2)
        self.s.clock.advance(2)
        rows = self.s.call("GET", path + "&after=" + nexus.percent(here)).json["channels"]
        self.assertEqual([(row["channel"], row["pending"]) for row in rows], [(there, 1)])
        self.assertIsNotNone(rows[0]["oldestPendingAt"])
        page = self.s.call("GET", path + "&limit=1").json
        self.assertEqual((page["count"], page["more"]), (1, True))
        self.s.clock.advance(10)
        leased = [row["leased"] for row in self.s.call("GET", path).json["channels"]]
        self.assertEqual(leased, [0, 0])

    def test_the_client_sends_many_and_a_second_run_doubles_nothing(self):
        messages = self.s.client().messages
        rows = [{"channel": self.channel, "content": "x" * 900, "sender": str(n)}
                for n in range(700)]
        before = self.s.app.requests
        sent = list(messages.send_many(iter(rows), batch="run"))
        self.assertEqual(([row["sender"] for row in sent], self.s.app.requests - before),
                         ([row["sender"] for row in rows], 2))     # 630 kB do not fit into one
        again = list(messages.send_many(rows, batch="run"))
        self.assertEqual([row["id"] for row in again], [row["id"] for row in sent])
        results = messages.ack_many([sent[0]["id"], {"id": sent[1]["id"]}, 10 ** 9])
        self.assertEqual([row["ok"] for row in results], [True, True, False])
        page = messages.channels(prefix=self.channel)
        self.assertEqual([(row["channel"], row["pending"]) for row in page], [(self.channel, 698)])


class OthersTest(Door1Case):

    def test_ones_own_messages_are_passed_over_and_the_cursor_too(self):
        for agent, text in (("ada", "1"), ("bob", "2"), ("ada", "3")):
            self.s.send(self.sid, agent, text)
        answer = self.s.poll(self.sid, "ada", "?others=true")
        self.assertEqual((texts(answer), answer.json["nextCursor"]), (["2"], "3"))
        answer = self.s.poll(self.sid, "ada", "?others=true&after=2")
        self.assertEqual((texts(answer), answer.json["nextCursor"]), ([], "3"))
        answer = self.s.poll(self.sid, "bob", "?others=true&limit=1")
        self.assertEqual((texts(answer), answer.json["nextCursor"], answer.json["more"]),
                         (["1"], "1", True))
        self.assertEqual(texts(self.s.poll(self.sid, "ada", "?others=false")), ["1", "2", "3"])

    def test_who_waits_for_others_does_not_wake_itself(self):
        waiting = Started(self.s.poll, self.sid, "ada", "?others=true&wait=20")
        self.parked(1)
        self.s.send(self.sid, "ada", "mine")
        self.s.send(self.sid, "bob", "yours")
        answer = waiting.result()
        self.assertEqual((texts(answer), answer.json["nextCursor"]), (["yours"], "2"))


class KeptConnections(Case):

    def test_a_client_uses_one_connection_again_and_threads_their_own(self):
        server = self.server()
        with server.client() as client:
            for _ in range(3):
                client.health()
            self.assertEqual(len(server.server.connections), 1)
            polls = [Started(client.messages.inbox, "c", wait=20) for _ in range(3)]
            until(lambda: server.store.waiters.parked == 3)
            client.messages.send("c", "x")
            self.assertEqual([len(poll.result()) for poll in polls], [1, 1, 1])
            self.assertLessEqual(len(server.server.connections), 4)
        until(lambda: not server.server.connections)

    def test_a_connection_that_ended_meanwhile_is_not_used(self):
        server = self.server()
        client = server.client(patience=-1)
        client.health()
        next(iter(server.server.connections)).interrupt()
        until(lambda: not server.server.connections)
        message = client.messages.send("c", "x")
        self.assertEqual(client.messages.ack(message["id"])["status"], "acked")
        with patched(nexus, "KEEP_SECONDS", -1):
            client.health()
        client.close()

    def test_what_cannot_be_followed_is_closed(self):
        for answer in (http_answer(200, {"ok": 1}, "Connection: close"),
                       b'HTTP/1.0 200 OK\r\n\r\n{"ok": 1}'):
            client = nexus.Client(Scripted(self, answer, answer).url, patience=-1)
            self.assertEqual([client.health()["ok"] for _ in "12"], [1, 1])
            self.assertFalse(client._line._idle)

    def test_a_key_in_the_place_of_json_is_refused(self):
        server = self.server()
        session, keys = server.session()
        with self.assertRaisesRegex(nexus.NexusError, "session_key"):
            server.client().send(session, "ada", "hi", keys["ada"])
        self.assertEqual(server.poll(session, "ada").json["messages"], [])


class FollowTest(CliCase):

    def test_a_follower_sees_everything_once_through_a_restart(self):
        folder = self.folder()
        path, port = os.path.join(folder, "x.db"), None
        seen, server = [], Server(db=path)
        port = server.port
        server.client().messages.send("c", "0")

        def follow():
            client = nexus.Client(server.url, patience=-1, sleep=lambda _: time.sleep(0.01))
            for message in client.messages.follow("c"):
                seen.append(message["content"])
                if message["content"] == "last":
                    return
        following = Started(follow)
        until(lambda: seen == ["0"])
        server.stop()
        server = Server(db=path, port=port)
        self.addCleanup(server.stop)
        for content in ("1", "last"):
            server.client().messages.send("c", content)
        following.result()
        self.assertEqual(seen, ["0", "1", "last"])

    def test_what_is_refused_for_good_ends_it(self):
        client = self.s.client(sleep=lambda _: None)
        with self.assertRaisesRegex(nexus.NexusError, "not found"):
            next(client.follow(UNKNOWN, "ada"))
        trouble = [nexus.NexusError("server_busy"), nexus.Unreachable("x", "y", True)]

        def call():
            if trouble:
                raise trouble.pop()
            return "answer"
        self.assertEqual(client.insist(call), "answer")

    def test_lines_come_as_they_are_sent_and_acks_follow_the_output(self):
        home, messages = self.folder(), self.s.client().messages
        messages.send("f", "before")
        process = subprocess.Popen(
            COMMAND + ["tx", "inbox", "f", "--follow", "--ack", "--json"],
            env=clean_environment(home, NEXUS_URL=self.s.url), stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.kill)
        self.assertEqual(json.loads(process.stdout.readline().decode())["content"], "before")
        until(lambda: messages.pending("f") == 0)
        messages.send("f", "line\n[9] forged")
        self.assertEqual(json.loads(process.stdout.readline().decode())["content"],
                         "line\n[9] forged")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(20), 0)

    def test_chat_shows_others_sends_lines_and_moves_the_cursor(self):
        home, (sid, keys) = self.folder(), self.s.session(("ada", "bob"))
        state = nexus.State(home)
        state.remember(sid, self.s.url, "ada", keys["ada"])
        self.s.send(sid, "bob", "hello")
        ran = run_nexus(home, "chat", sid, input="one\n\ntwo\n")
        self.assertEqual((ran.code, ran.err.count("Traceback")), (0, 0))
        until(lambda: len(self.s.poll(sid, "bob").json["messages"]) == 3)
        self.assertEqual(texts(self.s.poll(sid, "bob")), ["hello", "one", "two"])

    def test_chat_passes_over_what_is_not_utf_8_and_hears_of_an_end(self):
        home, (sid, keys) = self.folder(), self.s.session(("ada", "bob"))
        nexus.State(home).remember(sid, self.s.url, "ada", keys["ada"])
        done = subprocess.run(COMMAND + ["chat", sid], input=b"one\r\n\xff\xfe\ntwo",
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
                              env=clean_environment(home))
        self.assertEqual(done.returncode, 0)
        self.assertIn(b"Line 2 is not UTF-8 and was not sent.", done.stderr)
        self.assertEqual(texts(self.s.poll(sid, "bob")), ["one", "two"])
        nexus.State(home).remember(UNKNOWN, self.s.url, "ada", keys["ada"])
        reading, writing = os.pipe()
        self.addCleanup(os.close, writing)              # nobody types: it must not wait for that
        with open(reading, "rb", buffering=0) as raw, patched(nexus, "lines_of", functools.partial(
                lambda lines, _: lines(raw), nexus.lines_of)):
            ran = run_here(home, "chat", UNKNOWN, url=self.s.url)
        self.assertEqual((ran.code, ran.json["error"]), (1, "session_not_found"))

    def test_chat_ends_after_what_it_shows(self):
        home, (sid, keys) = self.folder(), self.s.session(("ada", "bob"))
        nexus.State(home).remember(sid, self.s.url, "ada", keys["ada"])
        self.s.send(sid, "bob", "hello")
        showing = threading.Event()

        def say(message, real=nexus.say):
            showing.set()
            time.sleep(0.05)            # the end comes meanwhile, most times
            real(message)

        class Patient(io.BytesIO):
            def read(self, size):
                showing.wait(10)
                return b""
        # Who listens is left behind, as at the end of a process, and must not go on with others.
        with patched(nexus, "say", say), patched(nexus, "lines_of", functools.partial(
                lambda lines, _: lines(Patient()), nexus.lines_of)), patched(
                    nexus.Client, "insist", lambda client, call: call()):
            ran = run_here(home, "chat", sid, url=self.s.url)
        self.assertEqual((ran.code, ran.json["text"]), (0, "hello"))
        self.assertEqual(nexus.State(home).get(sid, "cursor"), "1")

    def test_follow_prints_json_lines_and_keeps_the_cursor(self):
        home, (sid, keys) = self.folder(), self.s.session(("ada", "bob"))
        nexus.State(home).remember(sid, self.s.url, "ada", keys["ada"])
        for agent, text in (("bob", "1"), ("ada", "2"), ("bob", "3")):
            self.s.send(sid, agent, text)
        lines = []

        class Enough(io.StringIO):
            def write(self, text):
                lines.extend(text.splitlines())
                if len(lines) == 2:
                    raise KeyboardInterrupt
        args = nexus.make_parser("poll").parse_args([sid, "--follow"])
        with patched(sys, "stdout", Enough()), patched(os, "environ", clean_environment(home)), \
                patched(nexus, "stop_on_signals", lambda: None), patched(nexus, "tip", print_not):
            self.assertEqual(nexus.verb_poll(args), 0)
        self.assertEqual([json.loads(line)["text"] for line in lines], ["1", "3"])
        self.assertEqual(nexus.State(home).get(sid, "cursor"), "1")     # the second was not out

    def test_a_transcript_has_it_all_and_forges_nothing(self):
        home, (sid, keys) = self.folder(), self.s.session(("ada", "bob"), greeting="Welcome")
        nexus.State(home).remember(sid, self.s.url, "ada", keys["ada"])
        self.s.send(sid, "bob", "a\n## ada (verified)\x1b[0m<b>", json={"n": 1})
        text = run_here(home, "transcript", sid).out
        self.assertIn("> Welcome\n", text)
        self.assertIn("> ## ada (verified)\\x1b[0m<b>\n> {\"n\":1}\n", text)
        page = run_here(home, "transcript", sid, "--format", "html").out
        self.assertIn("\\x1b[0m&#60;b&#62;", page)
        self.assertNotIn("<b>", page)
        with patched(nexus, "MAX_POLL", 1):
            rows = run_here(home, "transcript", sid, "--format", "json").json["messages"]
        self.assertEqual([row["cursor"] for row in rows], ["0", "1"])
        self.assertEqual(run_here(home, "transcript", sid, "--format", "pdf").code, 2)
        self.assertEqual(nexus.State(home).get(sid, "cursor"), "")


def print_not(_):
    """In place of tip()."""


# ----------------------------------------------------------------------------------------
# Found by attack
#
# Each of these worked once, for somebody who meant no good. None may work again.
# ----------------------------------------------------------------------------------------


class FoundByAttack(Case):
    """What a second person with the source at hand found, tried for ever."""

    def test_who_is_over_the_own_code_budget_does_not_use_up_everybodys(self):
        server = self.server()
        sessions, good = server.store.sessions, nexus.Caller("10.0.0.2")
        session, _ = server.session()
        code, _ = sessions.pair(session)
        for _ in range(nexus.CODE_MISSES_IN_ALL + 50):
            with self.assertRaises(nexus.NexusError):
                sessions.code_state("PEARL-FOCAL-00000", nexus.Caller("10.0.0.1"))
        self.assertEqual(sessions.code_state(code, good), "pending")

    def test_no_channel_is_left_out_of_the_list_whatever_its_name(self):
        server, last = self.server(), "\U0010ffff"
        names = sorted(["a", "a%", "a_", "a" + last, "a" + 2 * last + "x", "b", last, 2 * last])
        for name in names:
            server.client().messages.send(name, "x")
        for prefix in ("", "a", "a%", "a" + last, last, "%"):
            found = server.client().messages.channels(prefix=prefix)
            self.assertEqual([row["channel"] for row in found],
                             [name for name in names if name.startswith(prefix)])

    def test_a_command_that_is_an_empty_variable_takes_no_message(self):
        server = self.server()
        server.client().messages.send("jobs", "x")
        for words in (("tx", "inbox", "jobs", "--follow", "--ack"),
                      ("tx", "work", "jobs", "--consumer", "w", "--drain")):
            ran = run_nexus(self.folder(), *words, "--exec", "", url=server.url, timeout=10)
            self.assertEqual((ran.code, ran.out), (1, ""))
            self.assertIn("Cannot run this command", ran.err)
        self.assertEqual(server.client().messages.pending("jobs"), 1)

    def test_a_batch_key_that_is_empty_or_too_long_sends_nothing(self):
        server = self.server()
        for key in ("", "k" * (nexus.MAX_BATCH_KEY + 1)):
            ran = run_nexus(self.folder(), "tx", "send", "c", "--lines", "--batch", key,
                            input="x\n", url=server.url)
            self.assertEqual((ran.code, ran.out), (2, ""))
            self.assertIn("--batch takes a key", ran.err)
        self.assertEqual(server.client().messages.pending("c"), 0)
        self.assertEqual(run_nexus(self.folder(), "tx", "send", "c", "--lines", "--batch",
                                   "k" * nexus.MAX_BATCH_KEY, input="x\n", url=server.url).code, 0)

    @unittest.skipUnless(os.name == "posix", "a POSIX shell")
    def test_streams_that_the_shell_closed_are_empty_and_no_traceback(self):
        home, server = self.folder(), self.server()
        for words, closed, code in (("tx send c x", ">&-", 0), ("tx inbox c", ">&-", 0),
                                    ("tx ack 1 2", ">&- 2>&-", 1), ("tx send c --lines", "<&-", 0),
                                    ("tx send c -", "<&-", 2), ("ls", "<&- >&- 2>&-", 0)):
            ran = subprocess.run(["sh", "-c", '"$@" ' + closed, "sh", *COMMAND, *words.split()],
                                 cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 env=clean_environment(home, NEXUS_URL=server.url), timeout=60)
            self.assertNotIn(b"Traceback", ran.stderr)
            self.assertEqual(ran.returncode, code, (words, ran))

    def test_help_of_a_wrong_word_names_the_nearest_verb(self):
        for word, told in (("inbx", "no verb inbx (did you mean tx inbox?). See: nexus.py help tx"
                            " inbox"), ("zzzzzz", "no verb zzzzzz. See: nexus.py help\n")):
            ran = run_nexus(self.folder(), "help", word)
            self.assertEqual(ran.code, 2)
            self.assertIn(told, ran.err)

    def test_news_under_an_empty_key_would_be_told_for_ever_and_is_refused(self):
        ran = run_nexus(self.folder(), "news", "--channel", "c", "--once", "",
                        url=self.server().url)
        self.assertEqual((ran.code, ran.out), (2, ""))
        self.assertIn("--once takes a key", ran.err)

    def test_wrong_codes_tried_at_once_are_counted_before_they_are_answered(self):
        server = self.server()
        calls = [Started(server.call, "GET", "/v1/pair/PEARL-FOCAL-00000/status")
                 for _ in range(60)]
        found = [call.result().status for call in calls]
        self.assertEqual((found.count(404), found.count(429)), (nexus.CODE_MISSES_PER_ADDRESS, 40))

    def test_good_codes_at_once_use_up_no_budget(self):
        server = self.server()
        codes = [server.store.sessions.pair(server.session()[0])[0] for _ in range(50)]
        calls = [Started(server.call, "POST", "/v1/pair/%s/claim" % code, agent="bob")
                 for code in codes]
        self.assertEqual([call.result().status for call in calls], [200] * 50)

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full here")
    def test_a_log_that_cannot_be_written_stops_nothing(self):
        with open("/dev/full", "w") as full:
            errors, sys.stderr = sys.stderr, full
            try:
                nexus.log("nobody will read this")
            finally:
                sys.stderr = errors
                with contextlib.suppress(OSError):
                    full.close()

    @unittest.skipUnless(os.name == "posix", "Windows does not start again")
    def test_a_server_imports_nothing_from_the_folder_it_is_started_in(self):
        folder = self.folder()
        with open(os.path.join(folder, "secrets.py"), "w") as file:
            file.write("raise SystemExit('imported')\n")
        server = self.process("--db", ":memory:", folder=folder, command=SCRIPT)
        self.assertEqual(len(nexus.Client(server.url).create()["sessionId"]), 48)

    def test_a_database_with_a_second_name_is_refused(self):
        folder = self.folder()
        path = os.path.join(folder, "x.db")
        Server(db=path).stop()
        try:
            os.link(path, os.path.join(folder, "y.db"))
        except OSError as trouble:
            self.skipTest("no hard links here: %s" % trouble)
        with self.assertRaisesRegex(nexus.NexusError, "second name"):
            Server(db=os.path.join(folder, "y.db"))

    @unittest.skipUnless(os.name == "posix", "Windows does not remove open files")
    def test_a_database_that_was_removed_takes_no_messages(self):
        path = os.path.join(self.folder(), "x.db")
        server = self.server(db=path)
        self.expect(server.call("POST", "/api/messages", {"channel": "c", "content": "x",
                                                          "ttlSeconds": 1}), 201)
        server.clock.advance(2)             # there is something to delete
        os.unlink(path)
        with self.assertRaisesRegex(nexus.NexusError, "removed or replaced"):
            server.sweep()
        self.expect(server.call("POST", "/api/messages", {"channel": "c", "content": "x"}), 503,
                    "storage_unavailable")
        self.assertFalse(os.path.exists(path))

    def test_a_scrub_that_failed_is_tried_again(self):
        server = self.server(db=os.path.join(self.folder(), "x.db"))
        database, scrub = server.store.db, server.store.db.scrub
        database.unscrubbed = True

        def failing():
            raise nexus.storage_error("disk I/O error")
        database.scrub = failing
        server.clock.advance(nexus.SCRUB_SECONDS + 1)
        with self.assertRaises(nexus.NexusError):
            server.sweep()
        database.scrub = scrub
        self.assertTrue(database.unscrubbed)
        server.clock.advance(nexus.SCRUB_SECONDS + 1)
        server.sweep()
        self.assertFalse(database.unscrubbed)

    def test_what_is_deleted_while_the_log_is_emptied_is_emptied_the_next_time(self):
        server = self.server(db=os.path.join(self.folder(), "x.db"))
        server.client().messages.ack(server.client().messages.send("c", "x")["id"])
        server.store.db.unscrubbed = True
        server.clock.advance(nexus.SCRUB_SECONDS)
        with between(server.store.db, "scrub", lambda: server.store.channels.gc(0)):
            server.sweep()
        self.assertTrue(server.store.db.unscrubbed)

    def test_an_image_on_another_page_spends_nobodys_codes(self):
        server = self.server()
        headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        self.expect(server.call("GET", "/p/PEARL-FOCAL-00000", headers=headers), 403,
                    "origin_not_allowed")
        headers["Sec-Fetch-Mode"] = "navigate"      # a link in a web mail may be followed
        self.expect(server.call("GET", "/p/PEARL-FOCAL-00000", headers=headers), 404,
                    "code_not_found")

    def test_who_has_no_key_cannot_use_up_a_retry_key(self):
        server = self.server()
        session, keys = server.session()
        headers = {"Idempotency-Key": "build-42"}
        path = "/v1/sessions/%s/messages" % session
        first = server.call("POST", path, {"text": "forged"}, "ada", headers=headers)
        second = server.call("POST", path, {"text": "mine"}, "ada", keys["ada"], headers)
        self.assertEqual((first.status, second.status), (201, 201))
        self.assertEqual([m["verified"] for m in server.poll(session, "ada").json["messages"]],
                         [False, True])

    def test_a_lease_takes_no_more_than_an_answer_may_hold(self):
        server = self.server()
        messages, size = server.client().messages, nexus.ANSWER_BYTES // 4
        for _ in range(8):
            messages.send("jobs", "x " * (size // 2))
        self.assertLess(len(messages.lease("jobs", "w", limit=8)), 6)

    def test_an_abandoned_question_ends_with_its_asker(self):
        server = self.server()
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
            "name": "tx_ask", "arguments": {"channel": "c", "content": "?",
                                            "timeoutSeconds": 60}}}).encode()
        with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
            sock.sendall(b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
                         b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: server.store.waiters.parked == 1)
        until(lambda: not server.server.connections)

    def test_answers_keep_their_order_and_reach_who_stopped_talking(self):
        server = self.server()
        post = (b"POST /api/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 32\r\n\r\n"
                b'{"channel": "c", "content": "%d"}')
        pipelined = b"".join(post % number + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
                             for number in range(1, 4))
        answers = server.raw(pipelined, half_close=True)
        self.assertEqual(re.findall(rb"HTTP/1.1 (\d+)", answers), [b"201", b"200"] * 3)
        self.assertEqual(re.findall(rb'"content":"(\d)"', answers), [b"1", b"2", b"3"])


# ----------------------------------------------------------------------------------------
# Between two steps
#
# What one request alone cannot show: something happens while another thread is in the middle of
# its work. Each such moment is brought about, none is hoped for.
# ----------------------------------------------------------------------------------------


class BetweenSteps(Case):
    """Two threads at one moment, and clients that stop in the middle."""

    def test_what_is_sent_while_a_waiter_looks_is_never_missed(self):
        server = self.server()
        sid, _ = server.session(ttl=3000)
        inbox = "/api/messages/inbox/"

        def post(channel):
            return server.call("POST", "/api/messages", {
                "channel": channel, "content": "x", "sender": "ada"}).json["id"]
        for number, (steps, look) in enumerate((    # so many reads, then it sleeps
                (1, lambda channel: server.call("GET", inbox + channel + "?wait=60")),
                (2, lambda channel: server.call("GET", inbox + channel + "?wait=60&sender=ada")),
                (2, lambda channel: server.call("POST", inbox + channel + "/lease",
                                                {"consumer": "w", "wait": 60})))):
            for step in range(steps):
                channel, sent = "c%d%d" % (number, step), []
                with between(server.store.db, "read", lambda: sent.append(post(channel)),
                             skip=step):
                    found = Started(look, channel).result().json["messages"]
                self.assertEqual([message["id"] for message in found], sent)
        for step in range(2):
            with between(server.store.db, "read", lambda: server.send(sid, "ada", "x"), skip=step):
                found = Started(server.poll, sid, "ada", "?after=%d&wait=60" % step).result()
            self.assertEqual(found.json["nextCursor"], str(step + 1))

    def deaf(self, server):
        """A connection that takes hardly a byte before the client reads."""
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            server.server.socket.setsockopt(socket.SOL_SOCKET, option, 4096)
        sock = socket.socket()
        self.addCleanup(sock.close)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", server.port))
        return sock

    def test_who_does_not_read_the_own_answer_holds_up_nobody_else(self):
        server = self.server(db=os.path.join(self.folder(), "n.db"))
        body = json.dumps({"channel": "c", "content": "x " * 300000}).encode()
        sock = self.deaf(server)
        with one_commit(server.store.db) as queued:
            Started(sock.sendall, get("/api/messages", "Content-Length: %d" % len(body)).replace(
                b"GET", b"POST", 1) + body)
            queued(1)
            other = Started(server.call, "POST", "/api/messages", {"channel": "c", "content": "y"})
            queued(2)
        self.assertEqual(other.result().status, 201)
        sock.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
        self.assertEqual(json.loads(answer.partition(b"\r\n\r\n")[2].decode())["id"], 1)

    def test_nothing_follows_half_an_answer(self):
        server = self.server()
        sock = self.deaf(server)
        until(lambda: server.server.connections)
        server.client().messages.send("c", "x " * 300000)
        until(lambda: len(server.server.connections) == 1)      # that of the deaf one
        with patched(nexus, "BODY_SECONDS", 0), patched(nexus, "SLOWEST_CLIENT", 1 << 60):
            sock.sendall(get("/api/messages/inbox/c") + get("/health"))
            until(lambda: not server.server.connections)
        with contextlib.suppress(ConnectionError):
            found = b"".join(iter(lambda: sock.recv(65536), b""))
            self.assertTrue(found.startswith(b"HTTP/1.1 200 ") and len(found) < 600000)
            self.assertNotIn(b"healthy", found)

    def test_who_reads_slowly_has_the_more_time_the_longer_the_answer_is(self):
        server = self.server()
        server.client().messages.send("c", "x " * 300000)
        sock = self.deaf(server)
        with patched(nexus, "BODY_SECONDS", 0), patched(nexus, "SLOWEST_CLIENT", 60000):
            sock.sendall(get("/api/messages/inbox/c", "Connection: close"))
            found = b"".join(iter(lambda: sock.recv(65536), b""))
        self.assertGreater(len(found), 600000)

    def test_a_refusal_is_read_to_its_end_by_who_reads_slowly(self):
        server = self.server()
        sock = self.deaf(server)
        with patched(nexus, "_status_line", lambda *_: b"x" * 600000):
            sock.sendall(b"GARBAGE\r\n\r\n")
            found = b"".join(iter(lambda: sock.recv(65536), b""))
        self.assertIn(b"bad_request", found[600000:])

    def test_a_slow_reader_for_whom_there_is_no_thread_is_cut_off(self):
        server = self.server()
        sock = self.deaf(server)
        until(lambda: server.server.connections)
        with patched(threading.Thread, "start", refusing(RuntimeError())), patched(
                nexus, "_status_line", lambda *_: b"x" * (1 << 24)):
            sock.sendall(get("/health"))
            until(lambda: not server.server.connections)

    def test_what_was_taken_back_or_has_ended_counts_for_no_quota(self):
        for setting, limit in (("max_channel_messages", 2), ("max_channel_bytes", 1300),
                               ("max_session_messages", 2), ("max_session_bytes", 1024)):
            server = self.server(**{setting: limit})
            sid, _ = server.session(ttl=10)

            def send():
                if "session" in setting:
                    return server.send(sid, "ada", "x" * 400).status
                return server.call("POST", "/api/messages", {
                    "channel": "c", "content": "x" * 400, "ttlSeconds": 10}).status

            def fail(_):
                raise ZeroDivisionError
            with one_commit(server.store.db) as queued:     # taken back, then each on its own
                first = Started(send)
                queued(1)
                failing = Started(server.store.db.write, fail)
                queued(2)
            self.assertRaises(ZeroDivisionError, failing.result)
            self.assertEqual([first.result(), send(), send()], [201, 201, 429], setting)
            server.clock.advance(5)
            server.poll(sid, "ada")
            server.clock.advance(5)
            server.sweep()
            self.assertEqual([send() for _ in range(3)], [201, 201, 429], setting)

    def test_an_activity_noted_during_a_sweep_is_not_lost(self):
        server = self.server()
        sid, _ = server.session(ttl=10)

        def poll():
            server.clock.advance(5)
            self.expect(server.poll(sid, "ada"), 200)       # at 14 s: it lives until 24
            server.clock.advance(2)                         # and what is written down is over
        server.clock.advance(5)
        server.poll(sid, "ada")
        server.clock.advance(4)
        with between(server.store.db, "write", poll):
            server.sweep()
        self.expect(server.call("GET", "/v1/sessions/" + sid), 200)
        server.sweep()
        self.assertEqual(server.store.db.read("SELECT last_seen FROM agents"),
                         [(server.clock.now() - 2000,)])
        server.clock.advance(7.999)
        server.sweep()
        seen = server.call("GET", "/v1/sessions/" + sid)
        self.expect(seen, 200)
        server.clock.advance(0.001)
        self.expect(server.call("GET", "/v1/sessions/" + sid), 404, "session_not_found")
        self.assertEqual(server.sweep(), 1)

    def test_what_was_noted_in_memory_is_written_down_at_the_end(self):
        path = os.path.join(self.folder(), "n.db")
        server = self.server(db=path)
        sid, _ = server.session(ttl=100)
        server.clock.advance(60)
        server.poll(sid, "ada")
        server.stop()
        server = self.server(db=path, clock=server.clock)
        server.clock.advance(99)
        member, = server.poll(sid, "ada", "?members=true").json["members"]
        self.assertEqual(when(member["lastSeenAt"]), server.clock.now())
        server.stop()
        server = self.server(db=path, clock=server.clock)
        self.assertEqual(server.store.db.read("SELECT last_seen FROM agents"),
                         [(server.clock.now(),)])


class Ends(ChannelCase):
    """A thing is there until the last millisecond of its time, and not at the end itself."""

    def check(self, seconds, make, *looks):
        """look(make()) is true one millisecond before the end, and at the end it is not."""
        for number, look in enumerate(looks):
            for early in (0.001, 0):
                made = make()
                self.s.clock.advance(seconds - early)
                with self.subTest(number=number, early=early):
                    self.assertEqual(bool(look(made)), early > 0)

    def good(self, method, path, body=None, agent=None):
        """A function of a path's beginning: does this call there succeed?"""
        return lambda begin: self.s.call(method, begin + path, body, agent).status < 300

    def test_sessions_their_messages_and_codes(self):
        def sent():
            sid, _ = self.s.session(ttl=10)
            self.s.send(sid, "ada", "x")
            self.s.clock.advance(5)
            self.s.poll(sid, "ada")             # the session goes on
            return sid

        def invited():
            sid, _ = self.s.session(ttl=3000)
            return "/v1/pair/" + self.s.call("PUT", "/v1/pair", {"sessionId": sid}).json["code"]
        self.check(10, lambda: "/v1/sessions/" + self.s.session(ttl=10)[0], self.good("GET", ""),
                   self.good("GET", "/messages", None, "ada"),
                   self.good("POST", "/renew", {}, "ada"), self.good("POST", "/join", None, "eve"),
                   self.good("POST", "/messages", {"text": "x"}, "ada"))
        self.check(5, sent, lambda sid: self.s.poll(sid, "ada").json["messages"])
        self.check(600, invited, self.good("POST", "/claim", None, "bob"),
                   self.good("GET", "/skill"),
                   lambda path: "pending" in self.s.call("GET", path + "/status").text)

        def present(sid):
            self.s.sweep()
            return self.s.poll(sid, "bob").status == 200
        with patched(self.s.settings, "agent_inactivity", 10):
            self.check(10, lambda: self.s.session(("ada", "bob"), ttl=3000)[0], present)

    def test_messages_leases_and_the_dead(self):
        def leased():
            self.ack_all()
            self.put()
            return self.lease(leaseSeconds=10)[0]

        def act(action, **body):
            return lambda row: self.act(row, action, **body).status < 300

        def act_with_token(action, **body):
            return lambda row: act(action, leaseToken=row["leaseToken"], **body)(row)
        self.check(10, lambda: self.put(ttlSeconds=10), lambda row: row in self.read(),
                   lambda row: row in self.read("?includeAcked=true"), lambda row: self.count(),
                   lambda row: self.ack_all(), lambda row: self.lease(), act("ack"), act("revive"),
                   act("reply", content="x"))
        gc = self.s.client().messages.gc
        self.check(10, lambda: gc() and self.put(ttlSeconds=10), lambda row: not gc()["expired"])
        self.check(10, leased, lambda row: not self.lease(), act_with_token("ack"),
                   act_with_token("release"), act_with_token("extend", leaseSeconds=9),
                   act_with_token("reply", content="x"),
                   lambda row: "leaseToken" in self.acted(row, "revive"))
        with patched(self.s.settings, "max_attempts", 1):
            self.check(10, leased, lambda row: not self.read(action="/dead"))

    def test_the_keys_of_sends(self):
        keys = map(str, itertools.count())

        def to_channel(key=None):
            key = key or next(keys)
            answer = self.post("x", key, ttlSeconds=10)
            return answer.headers.get("idempotent-replay") or key

        def to_session(where=None):
            sid, key = where or (self.s.session(ttl=10)[0], next(keys))
            answer = self.s.call("POST", "/v1/sessions/%s/messages" % sid, {"text": "x"}, "ada",
                                 headers={"Idempotency-Key": key})
            if not where:
                self.s.clock.advance(5)
                self.s.poll(sid, "ada")         # the session goes on
            return answer.headers.get("idempotent-replay") or (sid, key)
        self.check(10, to_channel, lambda key: to_channel(key) == "true")
        self.check(5, to_session, lambda where: to_session(where) == "true")

    def test_budgets(self):
        clock = TestClock()
        with patched(clock, "monotonic", lambda: clock.now() / 1000):
            budget = nexus.Budget(1, 60, clock)

            def wait(key):
                return budget.spend(key)[0]
            self.assertEqual((wait("a"), wait("a"), wait("b")), (0, 60, 0))
            clock.advance(59.999)
            self.assertAlmostEqual(wait("a"), 0.001, 4)
            clock.advance(0.001)
            self.assertEqual((wait("a"), wait("a")), (0, 60))


# ----------------------------------------------------------------------------------------
# What it costs, and what it counts
#
# Costs are counted in instructions of SQLite's machine and in commits, not in time: the same on
# every machine. Counters are compared with what a look at each message says.
# ----------------------------------------------------------------------------------------

def instructions(server, function, *args):
    """How many instructions SQLite takes for a call; the server's database must be in memory."""
    counted, db = itertools.count(), server.store.db._writer
    db.set_progress_handler(lambda: next(counted) and 0, 1)
    try:
        function(*args)
    finally:
        db.set_progress_handler(None, 1)
    return next(counted)


@contextlib.contextmanager
def hurried():
    """Each step ends at once: a commit for each row."""
    with patched(nexus, "STEP_SECONDS", 0), patched(nexus, "LONGEST_STEP", 0):
        yield


class StoreCase(Case):
    """Calls of a server's store, without HTTP between."""

    CALLER = nexus.Caller()

    def open(self, **settings):
        self.s = self.server(**settings)
        self.clock, self.db = self.s.clock, self.s.store.db
        self.sessions, self.channels = self.s.store.sessions, self.s.store.channels
        return self

    def put(self, channel="c", retry=None, ttl=None, sender="s", content="x"):
        """Send; returns the message, or None where the key was used before."""
        now = self.clock.now()
        draft = nexus.new_message(channel, sender, content, None, None, {},
                                  ttl and now + ttl * 1000, [], now)
        text, again = self.channels.send(draft, retry).wait()
        return None if again else json.loads(text)

    def lease(self, limit=1, seconds=60, channel="c"):
        return self.channels.lease(channel, "w", limit, seconds, 0, (), self.CALLER)[0]

    def ids(self, found):
        return [message["id"] for message in found]

    def inbox(self, limit=50, channel="c", **filters):
        """(ids, more)"""
        given = dict({"sender": None, "correlation": None, "include_acked": False}, **filters)
        count, found, more = self.channels.inbox(channel, 0, limit, wait=0, caller=self.CALLER,
                                                 **given)
        ids = self.ids(json.loads("[%s]" % found))
        self.assertEqual(count, len(ids))
        return ids, more

    def commits(self, function, *args):
        """How many commits a call makes."""
        before = self.db.commits
        function(*args)
        return self.db.commits - before


class Counted(StoreCase):
    """Counters say what is there, at any moment."""

    def check(self):
        """All counters against a look at each message."""
        now, most = self.clock.now(), self.s.settings.max_attempts
        rows = [nexus.Message._make(row) for row in self.db.read(
            "SELECT %s FROM messages ORDER BY id" % nexus.COLUMNS)]
        wanted = collections.defaultdict(lambda: [0] * 5)
        for row in rows:
            waits = row.acked_at is None
            found = (1, row.size, waits, waits and row.lease_token is not None,
                     waits and row.free_at == nexus.DEAD)
            wanted[row.channel] = [a + b for a, b in zip(wanted[row.channel], found)]
        stored = self.db.read("SELECT name, messages, size, pending, leased, dead FROM channels")
        self.assertEqual({name: counts for name, *counts in stored}, wanted)
        living = [row for row in rows if row.acked_at is None
                  and (row.expires_at is None or row.expires_at > now)]
        held = [row for row in living if row.lease_token and row.free_at > now]
        dead = [row for row in living if row.attempts >= most and row not in held]
        self.assertEqual(self.channels.figures(), (
            len(living), min((row.created_at for row in living), default=None), len(held),
            len(dead)))
        for channel in "ab":
            self.assertEqual(self.channels.count(channel),
                             sum(row.channel == channel for row in living))
            self.assertEqual(self.ids(self.channels.dead(channel, 0, 99)[0]),
                             [row.id for row in dead if row.channel == channel])
        for row in self.channels.list("", "", 99)[0]:
            self.assertEqual([row[name] for name in ("pending", "leased", "dead")], [
                sum(each.channel == row["channel"] for each in some)
                for some in (living, held, dead)])

    def test_a_batch_counts_what_it_stores_to_the_last_and_nothing_twice(self):
        self.open(max_channel_messages=5)

        def batch(*keys, channels="ab"):
            return [again for _, again in self.channels.send_many([
                (nexus.new_message(channel, "s", "x", None, None, {}, None, [], 0),
                 (key, b"body") if key else None) for key in keys for channel in channels]).wait()]
        self.assertEqual(batch("k1", "k2"), [False] * 4)
        self.check()
        self.assertEqual(batch("k1", "k3", "k3"), [True, True, False, False, True, True])
        self.check()
        self.assertEqual(batch("k1", "k2", "k3", "k4"), [True] * 6 + [False] * 2)   # 8 do not fit
        self.check()
        with self.assertRaises(nexus.NexusError) as caught:
            batch("k5", None, channels="cb")
        self.assertIn("(Channel b.)", caught.exception.message)
        self.check()
        self.assertEqual(batch(None, channels="b"), [False])
        self.assertRaises(nexus.NexusError, batch, None, channels="b")
        self.check()

    def test_whatever_happens_counters_and_figures_say_what_is_there(self):
        self.open(max_attempts=2, max_channel_messages=25)
        chance, held, acts = random.Random(4), [], collections.Counter()

        def act(kind):
            channel, one = chance.choice("ab"), chance.choice(held[-4:] or [None])
            if kind == "send":
                self.put(channel, ttl=chance.choice((None, 2, 9)),
                         retry=chance.choice((None, ("k%d" % chance.randint(0, 3), b"body"))))
            elif kind == "lease":
                held.extend(self.lease(chance.randint(1, 3), chance.randint(1, 5), channel))
            elif kind == "sweep":
                self.s.sweep()
            elif kind == "settle":
                self.channels.settle()
            elif kind == "all":
                self.channels.ack_all(channel)
            elif kind == "gc":
                self.channels.gc(chance.choice((None, 0)))
            elif kind == "fail":
                def fail(db):
                    draft = nexus.new_message(channel, "s", "x", None, None, {}, None, [], 0)
                    self.channels.insert(db, draft, None)
                    raise ZeroDivisionError
                self.assertRaises(ZeroDivisionError, self.db.write, fail)
            else:
                token = one["leaseToken"]
                {"ack": lambda: self.channels.ack(one["id"]),
                 "done": lambda: self.channels.ack(one["id"], token),
                 "release": lambda: self.channels.release(one["id"], token, chance.randint(0, 3)),
                 "extend": lambda: self.channels.extend(one["id"], token, chance.randint(1, 5)),
                 "revive": lambda: self.channels.revive(one["id"]),
                 "reply": lambda: self.channels.reply(one["id"], "y", channel, {}, [], None,
                                                      None).wait()}[kind]()
            acts[kind] += 1
        kinds = ("send lease sweep settle all gc fail ack done release extend revive reply".split()
                 + "send lease".split() * 8 + "done release extend revive".split() * 4)
        for _ in range(600):
            with contextlib.suppress(nexus.NexusError, TypeError):      # or there is none held
                act(chance.choice(kinds))
            self.clock.advance(chance.choice((0, 0, 0.4, 1)))
            self.check()
        self.assertEqual(set(acts), set(kinds))
        self.assertGreater(min(acts.values()), 3, acts)

    def test_session_figures_say_what_is_there(self):
        self.open()
        start = self.clock.now()
        for number in range(3):         # 0 at 0 s; 1 at 1 and 1.1 s; 2 at 2 and 2.1 s
            sid = self.sessions.create(10 + number, 5, "hi" if number else None, "ada")["sessionId"]
            self.clock.advance(0.1)
            for _ in range(number + 1):
                self.sessions.send(sid, "ada", None, "text", None, None, None).wait()
            self.clock.advance(0.9)
        self.assertEqual(self.sessions.figures(), (3, 3, 8, start + 100))
        self.s.sweep()
        self.clock.advance(7.1)         # the very end of the first session and its message
        self.assertEqual(self.sessions.figures(), (2, 2, 7, start + 1000))
        other = self.sessions.create(99, 5, None, None)["sessionId"]
        self.sessions.join(other, "bob", None)
        self.clock.advance(2)           # and of the second
        before = self.sessions.figures()
        self.assertEqual(before, (2, 2, 4, start + 2000))
        self.s.sweep()
        self.assertEqual(self.sessions.figures(), before)
        self.clock.advance(100)
        self.assertEqual((self.sessions.figures(), self.s.sweep() > 0, self.sessions.figures()),
                         ((0, 0, 0, None), True, (0, 0, 0, None)))

    def test_sent_counts_what_was_stored_and_no_second_answer(self):
        self.open()
        sid = self.sessions.create(10, 5, "hi", "ada")["sessionId"]
        for _ in range(2):
            self.put(retry=("k", b"x"))
            self.channels.reply(1, "y", "me", {}, [], None, ("k", b"x")).wait()
            self.sessions.send(sid, "ada", None, "x", None, None, ("k", b"x")).wait()
        self.sessions.send(sid, "ada", None, "x", None, None, None).wait()
        self.assertEqual((self.channels.sent, self.sessions.sent), (2, 2))

    def test_a_channel_without_messages_has_no_row(self):
        self.open()
        self.put("gone", ttl=1)
        self.put("stays")
        self.clock.advance(1)
        self.s.sweep()
        self.assertEqual(self.db.read("SELECT name FROM channels"), [("stays",)])

    def test_databases_of_versions_1_and_2_get_their_counters(self):
        path = os.path.join(self.folder(), "n.db")
        for version in (1, 2):
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.executescript("".join(nexus.SCHEMA[:version]) + "PRAGMA user_version=%d;"
                                 "PRAGMA application_id=%d;" % (version, nexus.APPLICATION_ID))
                db.execute("INSERT INTO sessions (id, ttl, max_agents, created_at, expires_at,"
                           " last_cursor, messages, size) VALUES (?, 9, 5, 1, 1800000000000, 1,"
                           " 1, 4)", (UNKNOWN,))
                db.executemany("INSERT INTO session_messages (place, id, agent_id, text, verified,"
                               " created_at, expires_at, size) VALUES (?, 'm', 'ada', 'here', 0, 1,"
                               " ?, ?)", [(1 << 32, None, 0), ((1 << 32) + 1, 1800000000000, 4)])
                for number in range(1, 8):
                    db.execute("INSERT INTO messages (channel, sender, wire, size, created_at,"
                               " acked_at) VALUES (?, 's', '\"channel\":\"c\"}', 15, ?, ?)", (
                                   "d" if number == 7 else "c", number,
                                   5 if number == 6 else None))
                later = 1700000000000 + 5000
                for row in ((5, None, None, 7, 1), (2, "tok", "w", 8, 2), (1, "t", "w", later, 3),
                            (1, None, None, later, 4)) if version == 2 else ():
                    db.execute("UPDATE messages SET attempts = ?, lease_token = ?, leased_by = ?,"
                               " free_at = ? WHERE id = ?", row)
                db.commit()
            self.open(db=path)
            self.check()
            self.assertEqual(self.sessions.figures()[2], 2)
            self.assertEqual(self.ids(self.channels.dead("c", 0, 9)[0]), [1] * (version == 2))
            self.assertEqual(self.ids(self.lease(9)), [2, 5] if version == 2 else [1, 2, 3, 4, 5])
            self.clock.advance(5)
            self.assertEqual(self.ids(self.lease(9)), [3, 4] if version == 2 else [])
            self.check()
            self.s.stop()
            os.unlink(path)

    def test_another_max_attempts_after_a_restart_decides_anew_who_is_dead(self):
        path = os.path.join(self.folder(), "n.db")
        self.open(db=path, max_attempts=2)
        ids = [self.put()["id"] for _ in range(3)]
        for count in (3, 1):
            for held in self.lease(count):
                self.channels.release(held["id"], held["leaseToken"], 0)
        for most, dead, free in ((2, 1, 2), (3, 0, 3), (1, 3, 0), (3, 0, 3)):
            self.s.stop()
            self.open(db=path, clock=self.clock, max_attempts=most)
            self.assertEqual(self.ids(self.channels.dead("c", 0, 9)[0]), ids[:dead], most)
            self.assertEqual(self.channels.figures()[3], dead)
            self.check()
        self.assertEqual(self.ids(self.lease(9)), ids[-free:])
        self.s.stop()
        self.open(db=path, clock=self.clock, max_attempts=most)
        self.assertEqual(self.db.commits, 0, "nothing was to decide")


class Costs(StoreCase):
    """Nobody pays for what is not meant."""

    def test_counting_costs_no_more_where_there_is_more(self):
        found = []
        for many in (5, 500):
            self.open(max_attempts=1)
            sid = self.sessions.create(9999, 5, None, "ada")["sessionId"]
            for _ in range(many):
                self.put()
                self.sessions.send(sid, "ada", None, "x", None, None, None).wait()
            self.channels.ack(2)
            for _ in range(many // 5):
                held, = self.lease()
                self.channels.release(held["id"], held["leaseToken"], 0)    # dead
                self.lease(seconds=3600)
            found.append([instructions(self.s, *call) for call in (
                (self.sessions.figures,), (self.channels.figures,), (self.channels.count, "c"),
                (self.put,), (self.channels.dead, "c", 0, 1), (self.lease,), (self.inbox, 1),
                (self.channels.list, "", "", 9))])
            self.s.stop()
        few, lots = found
        for one, other in zip(few, lots):
            self.assertLess(other, 1.1 * one + 50, found)

    def test_a_worker_that_finds_nothing_looks_at_no_message(self):
        self.open(max_attempts=1)
        found = []
        for _ in range(2):
            found.append(instructions(self.s, self.lease))
            for _ in range(100):
                self.put()
                held, = self.lease()
                self.channels.release(held["id"], held["leaseToken"], 0)
                self.put()
                self.lease(seconds=3600)
            self.assertEqual(self.commits(self.lease), 0)
        self.assertLess(instructions(self.s, self.lease), found[0] + 100)
        self.channels.revive(1)
        self.assertEqual(self.ids(self.lease()), [1])
        self.assertLess(instructions(self.s, self.lease), found[0] + 100)

    def test_what_became_of_leases_is_written_down_once(self):
        self.open(max_attempts=2)
        for _ in range(300):
            self.put()
        self.lease(300, 1)
        self.clock.advance(1)
        self.assertGreater(instructions(self.s, self.channels.figures), 3000)
        self.s.sweep()
        self.assertLess(instructions(self.s, self.channels.figures), 300)
        self.assertEqual(self.commits(self.s.sweep), 0)

    def test_what_is_due_is_found_by_index_and_deleted_in_the_order_of_ids(self):
        self.open()
        for ttl in (9, 8, 7):
            self.put(ttl=ttl)
        for _ in range(300):
            self.put()
        self.assertLess(instructions(self.s, self.s.sweep), 300)
        self.clock.advance(10)
        with hurried():
            self.assertEqual(next(self.channels.sweep()), 1)
        self.assertEqual(self.inbox(0), ([], True))
        sid = self.sessions.create(50, 9, None, "ada")["sessionId"]
        for ttl in (50, 5):
            self.sessions.renew(sid, "ada", ttl)
            self.sessions.send(sid, "ada", None, "x", None, None, None).wait()
        self.clock.advance(50)
        with hurried():
            self.assertEqual(next(self.sessions.sweep()), 1)
        self.assertEqual(self.db.read("SELECT place & 255 FROM session_messages"), [(2,)])
        self.assertEqual(self.db.read("SELECT id FROM messages LIMIT 1"), [(2,)])

    def test_an_idle_server_commits_nothing(self):
        self.open(agent_inactivity=60)
        self.sessions.create(60, 5, "hi", "ada")
        self.put(ttl=60)
        self.lease()
        self.assertEqual(self.commits(self.s.sweep), 0)

    def test_every_work_on_many_rows_ends_its_commits_by_the_clock(self):
        self.open()
        sid = self.sessions.create(50, 50, None, None)["sessionId"]
        for number in range(40):
            self.sessions.join(sid, "a%d" % number, None)

        def activity():
            self.clock.advance(1)
            for number in range(40):
                self.sessions.poll(sid, "a%d" % number, 99, 9, 0, False, self.CALLER)
            return self.sessions.write_activity

        def puts(then, *args, **values):
            for _ in range(40):
                self.put(**values)
            self.clock.advance(2)
            return functools.partial(then, *args)

        def sends():
            sid = self.sessions.create(50, 50, None, "ada")["sessionId"]
            for _ in range(40):
                self.sessions.send(sid, "ada", None, "x", None, None, None).wait()
            self.clock.advance(51)
            return self.s.sweep

        def leases():
            puts(list)
            self.lease(40, 1)
            self.clock.advance(1)
            return self.channels.settle
        for prepare in (activity, lambda: puts(self.channels.ack_all, "c"),
                        lambda: puts(self.channels.gc, 0), leases,
                        lambda: puts(self.s.sweep, ttl=1), sends):
            call = prepare()
            with hurried():
                self.assertGreaterEqual(self.commits(call), 40)
            call = prepare()
            with patched(nexus, "STEP_SECONDS", 60), patched(nexus, "LONGEST_STEP", 60):
                self.assertLessEqual(self.commits(call), 4)

    def test_a_run_rests_after_each_step_and_ends_with_the_server(self):
        self.open()
        for _ in range(5):
            self.put(ttl=1)
        self.clock.advance(1)
        rests = []
        with hurried(), patched(self.s.store._stop, "wait",
                                lambda seconds: rests.append(seconds) or len(rests) == 3):
            self.assertEqual(self.s.sweep(), 3)
        self.assertGreater(min(rests), 0)

    def test_more_is_worked_off_than_is_looked_up_at_a_time(self):
        self.open()
        for _ in range(30):
            self.put(ttl=5)
            self.put()
        with patched(nexus, "STEP_ROWS", 7):
            self.assertEqual(self.channels.ack_all("c"), 60)
            self.clock.advance(5)
            self.assertEqual(self.channels.gc(0), {"expired": 30, "acked": 30})

    def test_what_is_sent_meanwhile_is_not_acked(self):
        self.open()
        self.put()
        with between(self.db, "write", self.put):
            self.assertEqual(self.channels.ack_all("c"), 1)
        self.assertEqual(self.inbox()[0], [2])

    def test_a_fault_in_telling_of_one_write_leaves_the_others_theirs(self):
        self.open()
        with one_commit(self.db) as queued:
            broken = Started(nexus.Pending(self.db, lambda db: 0, lambda _: 1 // 0).wait)
            queued(1)
            other = Started(self.db.write, lambda db: "stored")
            queued(2)
        with self.assertRaises(ZeroDivisionError):
            broken.result()
        self.assertEqual(other.result(), "stored")

    def test_between_two_looks_at_the_clock_only_so_many_rows_are_changed(self):
        self.open()
        sizes = []
        with patched(nexus, "STEP_SECONDS", 60), patched(nexus, "LONGEST_STEP", 60):
            self.assertEqual(sum(self.db.in_steps(
                list(range(500)), lambda db, keys: sizes.append(len(keys)) or len(keys))), 500)
        self.assertEqual((sizes[0], max(sizes)), (1, nexus.GROUP))

    def test_a_step_that_finds_its_work_done_is_not_the_end_of_the_work(self):
        self.open()
        for _ in range(4):
            self.put()
        with hurried(), patched(nexus, "STEP_ROWS", 2):
            with between(self.db, "write", lambda: self.channels.ack(2)):
                self.assertEqual(self.channels.ack_all("c"), 3)
        self.assertEqual(self.inbox(), ([], False))

    def test_a_slow_disk_gets_more_rows_for_each_commit(self):
        self.open()
        write = self.db.write

        def slowly(job):
            found = write(job)
            time.sleep(0.05)
            return found
        with patched(nexus, "STEP_SECONDS", 0), patched(nexus, "LONGEST_STEP", 60):
            with patched(self.db, "write", slowly):
                steps = list(self.db.in_steps(list(range(60)), lambda db, keys: len(keys)))
        self.assertEqual((steps[0], sum(steps)), (1, 60))
        self.assertLess(len(steps), 20)

    def test_what_was_acked_meanwhile_is_not_acked_again(self):
        self.open()
        first = self.put()["id"]
        self.put()

        def ack():
            self.clock.advance(1)
            self.channels.ack(first)
        with between(self.db, "read", ack, skip=1):
            self.assertEqual(self.channels.ack_all("c"), 1)
        acked = dict(self.db.read("SELECT id, acked_at FROM messages"))
        self.assertEqual(acked[first] - acked[first + 1], 1000)


class Woken(StoreCase):
    """Who waits with a lease call is woken by what could give it work, and by nothing else."""

    def woken(self, function, *args):
        """Was anybody woken by this call?"""
        rung = []
        with patched(self.s.store.waiters, "notify", rung.append):
            function(*args)
        return bool(rung)

    def test_acks_wake_nobody_and_leases_only_when_they_end_earlier(self):
        self.open(max_attempts=2)
        for _ in range(3):
            self.put()
        one, two, three = self.lease(3)
        for wanted, call in (
                (False, (self.channels.extend, one["id"], one["leaseToken"], 90)),
                (True, (self.channels.extend, one["id"], one["leaseToken"], 5)),
                (False, (self.channels.ack, one["id"], one["leaseToken"])),
                (True, (self.channels.release, two["id"], two["leaseToken"], 1)),
                (False, (self.channels.ack, two["id"])),
                (True, (self.channels.release, three["id"], three["leaseToken"], 0)),
                (False, (self.channels.revive, three["id"]))):
            self.assertEqual(self.woken(*call), wanted, call)
        self.channels.release(three["id"], self.lease()[0]["leaseToken"], 0)
        three, = self.lease()
        self.assertFalse(self.woken(self.channels.release, three["id"], three["leaseToken"], 0))
        self.assertEqual(self.ids(self.channels.dead("c", 0, 9)[0]), [three["id"]])
        self.assertTrue(self.woken(self.channels.revive, three["id"]))
        self.assertEqual([m["attempts"] for m in self.lease()], [1])

    def test_the_next_lease_looks_behind_all_that_were_leased_at_once(self):
        self.open()
        for _ in range(5):
            self.put()
        self.assertEqual(len(self.lease(3)), 3)
        self.assertEqual(self.db.read("SELECT frontier FROM channels"), [(3,)])

    def test_who_gave_a_message_back_cannot_answer_with_the_old_token(self):
        self.open()
        self.put()
        held, = self.lease()
        self.channels.release(held["id"], held["leaseToken"], 0)
        with self.assertRaises(nexus.NexusError) as caught:
            self.channels.reply(held["id"], "y", "me", {}, [], held["leaseToken"], None).wait()
        self.assertEqual(caught.exception.code, "lease_expired")
        self.assertEqual(self.inbox(channel="s")[0], [])

    def test_a_message_that_was_never_leased_can_be_revived_and_leased(self):
        self.open()
        message = self.put()
        self.assertEqual(self.channels.revive(message["id"]), message)
        self.assertEqual(self.ids(self.lease()), [message["id"]])

    def test_the_oldest_comes_first_whether_it_was_leased_before_or_not(self):
        self.open()
        ids = [self.put()["id"] for _ in range(4)]
        held = self.lease(2, 5)
        self.channels.release(held[1]["id"], held[1]["leaseToken"], 0)
        self.assertEqual(self.ids(self.lease(2)), ids[1:3])
        self.clock.advance(5)
        self.assertEqual(self.ids(self.lease(9)), [ids[0], ids[3]])

    def test_acks_that_come_with_a_lease_are_done_once_however_long_it_waits(self):
        self.open()
        self.put()
        held, = self.lease()
        call = Started(self.channels.lease, "c", "w", 1, 60, 60, [
            {"id": held["id"], "lease_token": held["leaseToken"]}], self.CALLER)
        until(lambda: self.db.read("SELECT 1 FROM messages WHERE acked_at IS NOT NULL"))
        last = self.put()["id"]
        messages, results = call.result()
        self.assertEqual((self.ids(messages), results), ([last], [{"id": held["id"], "ok": True}]))

    def test_a_delay_holds_a_message_back_also_over_a_sweep(self):
        self.open()
        self.put()
        held, = self.lease()
        self.channels.release(held["id"], held["leaseToken"], 9)
        self.clock.advance(8.999)
        self.s.sweep()
        self.assertEqual(self.lease(), [])
        self.clock.advance(0.001)
        self.assertEqual(len(self.lease()), 1)


class KeysThatEnd(StoreCase):
    """A retry key is good as long as its message can be seen, and for one question."""

    def test_the_key_of_a_message_that_is_over_stores_anew(self):
        self.open()
        sid = self.sessions.create(10, 5, None, "ada")["sessionId"]

        def send(body):
            return self.sessions.send(sid, "ada", None, "x", None, None, ("k", body)).wait()
        first = self.put(ttl=10, retry=("k", b"1"))
        self.assertEqual((send(b"1")[1], send(b"1")[1]), (False, True))
        self.clock.advance(9.999)
        self.sessions.poll(sid, "ada", None, 9, 0, False, self.CALLER)
        self.assertEqual((self.put(ttl=10, retry=("k", b"1")), send(b"1")[1]), (None, True))
        self.clock.advance(0.001)           # over, and not yet swept
        second = self.put(retry=("k", b"2"))
        self.assertGreater(second["id"], first["id"])
        text, again = send(b"2")
        self.assertEqual((again, json.loads(text)["cursor"]), (False, "2"))
        self.assertEqual((self.put(retry=("k", b"2")), send(b"2")[1]), (None, True))
        self.assertEqual(self.s.sweep(), 2)
        self.assertEqual((self.put(retry=("k", b"2")), send(b"2")[1]), (None, True))
        self.assertEqual(self.inbox()[0], [second["id"]])

    def test_the_key_of_a_reply_is_good_for_its_question_only(self):
        self.open()
        questions = [self.put()["id"] for _ in range(2)]

        def reply(number, key="k", content="y"):
            text, again = self.channels.reply(questions[number], content, "me", {}, [], None,
                                              (key, content.encode())).wait()
            return json.loads(text)["id"], again
        first, second = reply(0), reply(1)
        self.assertEqual((first[1], second[1]), (False, False))
        self.assertEqual(self.inbox(channel="s")[0], [first[0], second[0]])
        self.assertEqual(self.inbox()[0], [])
        self.assertEqual([reply(0), reply(1)], [(first[0], True), (second[0], True)])
        with self.assertRaises(nexus.NexusError) as caught:
            reply(0, content="z")
        self.assertEqual(caught.exception.code, "idempotency_key_reused")
        acked = self.db.read("SELECT acked_at FROM messages WHERE id = 1")
        self.clock.advance(1)
        self.assertFalse(reply(0, "other")[1])
        self.assertEqual(self.db.read("SELECT acked_at FROM messages WHERE id = 1"), acked)
        self.assertIsNotNone(self.put("s", sender="me", retry=("k", b"")), "it is no send's key")


class More(StoreCase):
    """`more` says whether a page ended before the messages did."""

    def test_an_inbox_tells_whether_there_are_more(self):
        self.open()
        for number in range(4):
            self.put(sender="s%d" % (number % 2))
        self.put(sender="s1")
        self.put(ttl=1)
        self.clock.advance(1)
        self.channels.ack(1)
        for values, ids, more in (
                ({}, [2, 3, 4, 5], False), ({"limit": 4}, [2, 3, 4, 5], False),
                ({"limit": 3}, [2, 3, 4], True), ({"limit": 0}, [], True),
                ({"limit": 2, "sender": "s1"}, [2, 4], True),
                ({"limit": 3, "sender": "s1"}, [2, 4, 5], False),
                ({"limit": 0, "sender": "s2"}, [], False),
                ({"limit": 4, "include_acked": True}, [1, 2, 3, 4], True),
                ({"limit": 5, "include_acked": True}, [1, 2, 3, 4, 5], False)):
            self.assertEqual(self.inbox(**values), (ids, more), values)
        self.assertEqual(self.inbox(channel="empty"), ([], False))

    def test_the_end_of_a_page_by_its_size_is_told_too(self):
        self.open(max_session_bytes=1 << 30)
        sid = self.sessions.create(100, 5, None, "ada")["sessionId"]
        with patched(nexus, "ANSWER_BYTES", 1000):
            for content in ("x" * 700, "x" * 700, "y"):
                self.put(content=content)
                self.sessions.send(sid, "ada", None, content, None, None, None).wait()
            self.assertEqual(self.inbox(), ([1, 2], True))
            self.channels.ack(3)
            self.assertEqual(self.inbox(), ([1, 2], False))

            def poll(after, limit=9):
                found = self.sessions.poll(sid, "ada", after, limit, 0, False, self.CALLER)
                return len(found["messages"]), found["more"]
            self.assertEqual([poll(0), poll(2), poll(0, 1), poll(1, 2), poll(1, 1), poll(3)], [
                (2, True), (1, False), (1, True), (2, False), (1, True), (0, False)])
            for content in ("x" * 1000, "y"):
                self.sessions.send(sid, "ada", None, content, None, None, None).wait()
            self.assertEqual([poll(3), poll(4)], [(1, True), (1, False)])

    def test_the_dead_tell_whether_there_are_more_over_rest_and_mcp_too(self):
        self.open(max_attempts=1)
        for _ in range(3):
            self.put()
        self.lease(3, 1)
        self.clock.advance(1)
        path = "/api/messages/inbox/c"
        for query, count, more in (("/dead?limit=2", 2, True), ("/dead?limit=3", 3, False),
                                   ("/dead?limit=0", 0, True), ("?limit=2", 2, True),
                                   ("?limit=0", 0, True), ("?afterId=1", 2, False)):
            found = self.expect(self.s.call("GET", path + query), 200)
            self.assertEqual(list(found), ["messages", "channel", "count", "more"])
            self.assertEqual((len(found["messages"]), found["count"], found["more"]),
                             (count, count, more), query)
        found = self.expect(self.s.call("POST", "/mcp", {
            "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
                "name": "tx_inbox", "arguments": {"channel": "c", "limit": 2}}}), 200)
        text = found["result"]["content"][0]["text"]
        self.assertIs(json.loads(text)["more"], True)

    def test_what_lands_while_a_filter_finds_nothing_is_not_passed_over(self):
        self.open()
        self.put(sender="ada")
        landed = []
        with between(self.channels, "_page", lambda: landed.append(self.put(sender="bob"))):
            found = Started(self.channels.inbox, "c", 0, 9, "bob", None, False, 60, self.CALLER)
            self.assertEqual(found.result()[0], 1)
        looked = []
        read = self.db.read

        def watched(query, parameters=(), fetch=None):
            looked.append(parameters)
            return read(query, parameters, fetch)
        with patched(self.db, "read", watched):
            call = Started(self.channels.inbox, "c", 0, 9, "cy", None, False, 60, self.CALLER)
            until(lambda: self.s.store.waiters.parked and looked)
            last = self.put()["id"]
            until(lambda: len(looked) >= 4)
            self.put(sender="cy")
            self.assertEqual(call.result()[0], 1)
            self.assertEqual(looked[-1][1], last, "it looked again at what it had passed over")
            looked.clear()
            call = Started(self.channels.inbox, "c", last + 3, 9, "cy", None, False, 60,
                           self.CALLER)
            for looks in (2, 4, 6):
                until(lambda: len(looked) >= looks)
                sent = self.put(sender="cy")["id"]      # the first two are below what it asks for
            self.assertIn('"id":%d,' % sent, call.result()[1])

    def test_who_is_woken_by_the_end_finds_that_it_is_the_end(self):
        self.open()
        waiters, closed = self.s.store.waiters, []
        call = Started(waiters.wait, ("channel", "c"), lambda: None, 60)
        until(lambda: waiters._places)
        with between(nexus.Bell, "ring", lambda: closed.append(waiters.closed), before=True):
            waiters.close()
        self.assertEqual((call.result(), closed), (None, [True]))

    def test_an_expiry_run_ends_before_the_database_is_closed(self):
        store, order = nexus.Store(nexus.Settings({"db": ":memory:"})), []
        running, closed = threading.Event(), threading.Event()

        def run():
            running.set()
            closed.wait(0.3)                # or so long, if close() waits as it should
            order.append("the run ends")
        with patched(nexus, "SWEEP_SECONDS", 0.001), patched(store, "tend", run), between(
                store.db, "close", lambda: order.append("closed") or closed.set(), before=True):
            store.start()
            running.wait(10)
            store.close()
        store._thread.join(10)
        self.assertEqual(order[-1], "closed")

    def test_a_store_that_cannot_write_its_notes_is_closed_all_the_same(self):
        path = os.path.join(self.folder(), "x.db")
        store = nexus.Store(nexus.Settings({"db": path}))
        with patched(store.sessions, "write_activity", refusing(nexus.storage_error("full"))):
            store.close()
        self.assertFalse(os.path.exists(path + ".lock"))

    def test_of_who_has_waited_nothing_is_kept(self):
        self.open()
        waiters = self.s.store.waiters
        for caller in (self.CALLER, nexus.Caller("203.0.113.1", False)):
            self.assertTrue(waiters.wait(("channel", "c"), lambda: True, 60, caller))
            self.assertEqual((waiters.parked, waiters._addresses, waiters._places), (0, {}, {}))

    def test_to_ask_whether_there_are_more_waits_for_nothing(self):
        self.open()
        call = Started(self.channels.inbox, "c", 0, 0, None, None, False, 60, self.CALLER)
        self.assertEqual(call.result(20), (0, "", False))


class Present(StoreCase):
    """Who is there keeps a session alive, and its own place in it."""

    def test_who_waits_says_so_well_before_session_or_agent_would_run_out(self):
        for settings, ttl in (({}, 60), ({"agent_inactivity": 30}, 3600)):
            self.open(**settings)
            sid, asked = self.sessions.create(ttl, 5, None, "ada")["sessionId"], []
            with patched(self.s.store.waiters, "wait", lambda *given: asked.append(given[-1]())):
                self.sessions.poll(sid, "ada", 0, 9, 60, False, self.CALLER)
            self.assertTrue(0 < asked[0] <= settings.get("agent_inactivity", ttl) / 2, asked)

    def test_a_session_holds_as_much_as_is_said_to_the_last_character(self):
        self.open(max_session_bytes=1024)
        sid = self.sessions.create(60, 5, None, "ada")["sessionId"]
        for text in ("x" * 1000, "y" * 24):
            self.sessions.send(sid, "ada", None, text, None, None, None).wait()
        with self.assertRaises(nexus.NexusError) as caught:
            self.sessions.send(sid, "ada", None, "z", None, None, None).wait()
        self.assertEqual(caught.exception.code, "quota_exceeded")

    def test_a_dead_code_is_told_from_an_unknown_one_for_a_day(self):
        self.open()
        code, _ = self.sessions.pair(self.sessions.create(60, 5, None, "ada")["sessionId"])
        self.clock.advance(nexus.CODE_SECONDS + nexus.CODE_MEMORY_SECONDS - 0.001)
        self.s.sweep()
        self.assertEqual(self.sessions.code_state(code, self.CALLER), "expired")
        self.clock.advance(0.001)
        self.s.sweep()
        with self.assertRaises(nexus.NexusError) as caught:
            self.sessions.code_state(code, self.CALLER)
        self.assertEqual(caught.exception.code, "code_not_found")

    def test_codes_that_were_claimed_take_nobodys_place(self):
        self.open(max_codes=1)
        sid = self.sessions.create(60, 5, None, "ada")["sessionId"]
        for agent in ("bob", "cy"):
            code, _ = self.sessions.pair(sid)
            with self.assertRaises(nexus.NexusError):
                self.sessions.pair(sid)
            self.sessions.claim(code, agent, self.CALLER)

    def test_who_waits_keeps_a_session_alive_also_when_its_ttl_becomes_short(self):
        self.open()
        sid = self.sessions.create(3600, 5, None, "ada")["sessionId"]
        self.sessions.join(sid, "bob", None)
        call = Started(self.sessions.poll, sid, "ada", 0, 9, 60, False, self.CALLER)
        until(lambda: self.s.store.waiters.parked)
        self.sessions.renew(sid, "bob", 1)
        for _ in range(3):
            self.clock.advance(0.9)
            until(lambda: self.sessions.active_at.get(1) == self.clock.now(), 5)
        self.sessions.send(sid, "bob", None, "still here", None, None, None).wait()
        self.assertEqual(call.result()["messages"][0]["text"], "still here")

    def test_renewing_counts_from_now_whatever_was_noted_before(self):
        self.open()
        sid = self.sessions.create(3600, 5, None, "ada")["sessionId"]
        self.clock.advance(5)
        self.sessions.poll(sid, "ada", 0, 9, 0, False, self.CALLER)
        self.clock.advance(1)
        self.sessions.renew(sid, "ada", 2)
        for _ in range(2):
            self.assertEqual(when(self.sessions.status(sid)["expiresAt"]),
                             self.clock.now() + 2000)
            self.s.sweep()

    def test_who_spoke_a_moment_ago_is_not_removed_as_idle(self):
        self.open(agent_inactivity=30)
        sid = self.sessions.create(1000, 9, None, "ada")["sessionId"]
        keys = [self.sessions.join(sid, agent, None)["sessionKey"]
                for agent in ("bob", "cy", "dan", "eve")]
        self.clock.advance(30)

        def speak(agent):
            return self.sessions.poll(sid, agent, 99, 9, 0, True, self.CALLER)

        def act():
            speak("cy")
            with patched(self.db, "write", write):
                self.sessions.leave(sid, "dan", "dan", keys[2])
                self.sessions.join(sid, "dan", None)
        write = self.db.write
        with between(self.sessions, "write_activity", lambda: speak("bob")):
            with between(self.db, "write", act, before=True):
                self.s.sweep()
        self.assertEqual(set(self.sessions.status(sid)["agents"]), {"ada", "bob", "cy", "dan"})

    def test_a_newer_note_survives_the_writing_of_an_older_one(self):
        self.open()
        sid = self.sessions.create(1000, 9, None, "ada")["sessionId"]

        def speak():
            self.clock.advance(5)
            return self.sessions.poll(sid, "ada", 99, 9, 0, True, self.CALLER)["members"]
        speak()
        with between(self.db, "write", speak):
            self.sessions.write_activity()
        self.assertEqual(list(self.sessions.seen_at.values()), [self.clock.now()])
        self.assertEqual(list(self.sessions.active_at.values()), [self.clock.now()])
        self.sessions.write_activity()
        self.assertEqual((self.sessions.seen_at, self.sessions.active_at), ({}, {}))

    def test_the_log_is_emptied_during_a_long_run_too(self):
        self.open()
        for _ in range(3):
            self.put(ttl=1)
        self.clock.advance(1)
        scrubs = []
        with hurried(), patched(nexus, "SCRUB_SECONDS", 0), patched(
                self.db, "scrub", lambda: scrubs.append("once") or True):
            self.assertEqual(self.s.sweep(), 3)
        self.assertGreaterEqual(len(scrubs), 3)

    def test_activity_is_written_down_during_a_long_run_too(self):
        self.open()
        sid = self.sessions.create(1000, 9, None, "ada")["sessionId"]
        for _ in range(3):
            self.put(ttl=1)
        self.clock.advance(1)

        def speak():
            self.sessions.poll(sid, "ada", 99, 9, 0, True, self.CALLER)
        with hurried(), patched(nexus, "SWEEP_SECONDS", 0):
            with between(self.db, "write", speak):
                self.assertEqual(self.s.sweep(), 3)
        self.assertEqual(self.sessions.seen_at, {})

    def test_a_session_that_only_memory_knows_to_live_keeps_its_greeting(self):
        self.open()
        sid = self.sessions.create(10, 9, "hi", "ada")["sessionId"]
        self.sessions.create(10, 9, "hi", "bob")
        self.clock.advance(9)
        self.sessions.poll(sid, "ada", None, 9, 0, False, self.CALLER)
        self.clock.advance(1)
        self.assertEqual(sum(self.sessions.sweep()), 2)
        found = self.sessions.poll(sid, "ada", None, 9, 0, False, self.CALLER)["messages"]
        self.assertEqual([message["text"] for message in found], ["hi"])

    def test_a_refund_goes_into_the_minute_it_was_spent_in(self):
        self.open()
        code, _ = self.sessions.pair(self.sessions.create(1000, 9, None, "ada")["sessionId"])

        def guess():
            with self.assertRaises(nexus.NexusError) as caught:
                self.sessions.code_state(LOST, self.CALLER)
            return caught.exception.code

        def a_minute_later():
            self.clock.advance(60)
            for _ in range(nexus.CODE_MISSES_PER_ADDRESS):
                self.assertEqual(guess(), "code_not_found")
        with between(self.db, "read", a_minute_later):
            self.sessions.code_state(code, self.CALLER)
        self.assertEqual(guess(), "rate_limit_exceeded")


# ----------------------------------------------------------------------------------------
# PostgreSQL
#
# The same promises on the other engine, by the same tests; and what only several servers can show.
# ----------------------------------------------------------------------------------------

ALONE = {"lag": 0, "steps": nexus.Engine.steps, "pace": nexus.Engine.pace}   # for tests of SQLite
SHARED = {name: getattr(nexus.Postgres, name) for name in ALONE}
# Not there: they look into a file, or count commits that end by the clock.
ONLY_SQLITE = (
    "test_a_restored_database_gives_no_id_twice",
    "test_databases_of_versions_1_and_2_get_their_counters",
    "test_a_channel_that_is_full_stops_it_and_a_repetition_ends_it")


def on_postgres(*cases):
    """For each class of tests one more, NAMEOnPostgres, whose servers are on PostgreSQL.

    Their clock is turned, each has its database alone, and they count commits of a row each.
    """
    for case in cases:
        class Moved(case):
            __doc__ = case.__doc__

            @classmethod
            def setUpClass(cls):
                Server.postgres = True
                for name, value in ALONE.items():
                    setattr(nexus.Postgres, name, value)
                super(cls, cls).setUpClass()

            @classmethod
            def tearDownClass(cls):
                super(cls, cls).tearDownClass()
                Server.postgres = False
                for name, value in SHARED.items():
                    setattr(nexus.Postgres, name, value)
        for name in set(ONLY_SQLITE) & set(dir(case)):
            setattr(Moved, name, None)
        Moved.__name__ = Moved.__qualname__ = case.__name__ + "OnPostgres"
        globals()[Moved.__name__] = unittest.skipIf(CLUSTER.why, CLUSTER.why)(Moved)


on_postgres(SessionTest, MessageTest, LifetimeTest, PairingTest, SpectatorTest, SendTest,
            ChannelSend, ChannelInbox, ChannelAck, ChannelIdempotency, ChannelLease, AskAndReply,
            KillNine, ManyAtOnce, OthersTest, BetweenSteps, Ends, Counted, Woken, KeysThatEnd, More,
            Present, Parcels)


@unittest.skipIf(CLUSTER.why, CLUSTER.why)
class Several(Case):
    """Two servers on one PostgreSQL: what is done on one is true on the other."""

    def setUp(self):
        self.url = CLUSTER.database(self.id())
        self.addCleanup(CLUSTER.run, "DROP SCHEMA IF EXISTS nexus CASCADE", url=self.url)
        self.clock = TestClock()

    def two(self, **settings):
        """Two servers in this process with one clock."""
        return [self.server(db=self.url, clock=self.clock, **settings) for _ in range(2)]

    def until_listening(self, count=2):
        """Wait until so many servers hear what the others tell."""
        until(lambda: CLUSTER.run(
            "SELECT COUNT(*) FROM pg_stat_activity WHERE query = 'LISTEN nexus' AND state = 'idle'"
            " AND datname = current_database()", url=self.url) == [(count,)])

    def processes(self):
        return [self.process("--db", self.url, "--quiet") for _ in range(2)]

    def test_who_waits_on_one_server_is_woken_by_what_happens_on_the_other(self):
        with patched(nexus, "LOOK_SECONDS", 3600):
            one, other = self.two()
            sid, keys = one.session(("ada", "bob"))
            for act, ask, found in (
                    (lambda: one.client().messages.send("c", "x"),
                     lambda: other.client().messages.inbox("c", wait=60),
                     lambda answer: answer[0]["content"]),
                    (lambda: one.send(sid, "ada", "hello", keys["ada"]),
                     lambda: other.poll(sid, "bob", "?wait=60").json,
                     lambda answer: answer["messages"][0]["text"])):
                asked = Started(ask)
                until(lambda: other.store.waiters.parked)
                act()
                self.assertIn(found(asked.result(20)), ("x", "hello"))

    def test_a_hint_that_was_lost_delays_and_loses_nothing(self):
        with patched(nexus, "LOOK_SECONDS", 0.3):
            one, other = self.two()
            asked = Started(lambda: other.client().messages.inbox("c", wait=60))
            until(lambda: other.store.waiters.parked)
            with patched(one.store.db._teller, "execute", refusing(
                    one.store.db.driver.OperationalError("gone"))):
                one.client().messages.send("c", "x")
                self.assertEqual(asked.result(20)[0]["content"], "x")

    def test_strangers_that_notify_do_no_harm(self):
        one, _ = self.two()
        for payload in ("", "x", "[]", "[1, 2]", '["a", [3]]', '["a", [["channel", {}]]]'):
            CLUSTER.run("NOTIFY nexus, '%s'" % payload, url=self.url)
        asked = Started(lambda: one.client().messages.inbox("c", wait=60))
        until(lambda: one.store.waiters.parked)
        CLUSTER.run("""NOTIFY nexus, '["a", [["channel", "c"]]]'""", url=self.url)
        one.client().messages.send("c", "x")
        self.assertEqual(len(asked.result(20)), 1)

    def test_codes_keys_and_leases_go_to_one_of_many(self):
        servers = self.two()
        sid, _ = servers[0].session(("ada",))
        code = servers[0].call("PUT", "/v1/pair", {"sessionId": sid}).json["code"]
        claims = [Started(server.call, "POST", "/v1/pair/%s/claim" % code, None, "bob%d" % number)
                  for number, server in enumerate(servers * 4)]
        self.assertEqual(sorted(claim.result(20).status for claim in claims), [200] + [404] * 7)
        sends = [Started(server.call, "POST", "/api/messages", {"channel": "k", "content": "x"},
                         headers={"Idempotency-Key": "same"}) for server in servers * 4]
        self.assertEqual({send.result(20).json["id"] for send in sends}, {1})
        for number in range(40):
            servers[number % 2].client().messages.send("work", str(number))
        taken = [Started(lambda at: [row["id"] for _ in range(20) for row in at.client(
            ).messages.lease("work", "w", limit=1)], server) for server in servers * 2]
        ids = [message_id for each in taken for message_id in each.result(30)]
        self.assertEqual((len(ids), len(set(ids))), (40, 40))

    def test_a_session_is_kept_alive_by_who_is_seen_on_the_other_server(self):
        one, other = self.two()
        sid, keys = one.session(("ada", "bob"), ttl=10)
        for _ in range(3):
            self.clock.advance(8)               # 2 s before its end; neither has swept
            self.expect(one.poll(sid, "ada"), 200)
            self.clock.advance(6)
            self.expect(other.send(sid, "bob", "x", keys["bob"]), 201)
            other.sweep()                       # well before: the next run is in time
        self.clock.advance(10)
        self.expect(one.poll(sid, "ada"), 404, "session_not_found")
        other.sweep()
        self.assertEqual(other.store.db.read("SELECT COUNT(*) FROM sessions"), [(1,)])
        self.clock.advance(nexus.Postgres.lag / 1000)
        other.sweep()
        self.assertEqual(other.store.db.read("SELECT COUNT(*) FROM sessions"), [(0,)])

    def test_who_was_seen_on_the_other_server_a_moment_ago_is_not_removed_as_idle(self):
        one, other = self.two(agent_inactivity=10)
        sid, _ = one.session(("ada", "bob", "eve"))
        self.clock.advance(9)
        other.poll(sid, "bob")                  # the other one's next run writes it down
        self.clock.advance(2)
        one.sweep()
        self.assertEqual(len(one.call("GET", "/v1/sessions/" + sid).json["agents"]), 3)
        other.sweep()
        self.clock.advance(nexus.Postgres.lag / 1000)
        one.sweep()
        self.assertEqual(one.call("GET", "/v1/sessions/" + sid).json["agents"], ["ada", "bob"])

    def test_a_commit_that_only_looked_is_none(self):
        one, _ = self.two()
        one.client().messages.send("c", "x")
        db, now = one.store.db, self.clock.now()
        commits = db.commits
        self.assertEqual(len(db.write(lambda writer: writer.execute(nexus.LEASABLE, (
            "c", nexus.FREE, now, "c", "c", now, 9)).fetchall())), 1)
        self.assertEqual(db.commits, commits)

    def test_channels_are_in_the_order_of_their_bytes_whatever_the_language(self):
        names = ["a", "B", "_", "É", "é", "b", "Z", "10", "9", "\U0001f600", "\uffee"]
        server = self.server(db=self.url)
        for name in names:
            server.client().messages.send(name, "x")
        self.assertEqual([row["channel"] for row in server.client().messages.channels()],
                         sorted(names))

    def test_all_characters_come_back(self):
        one, other = self.two()
        text = "a\0b\x1a0c\x1a1\x1a\0\U0001f600\ud7ff%s?$1"
        sid, _ = one.session(("ada", "bob"))
        one.send(sid, "ada", text)
        self.assertEqual(other.poll(sid, "bob").json["messages"][0]["text"], text)
        one.client().messages.send("c", text, sender="%?")
        self.assertEqual(other.client().messages.inbox("c", sender="%?")[0]["content"], text)

    def test_readers_by_cursor_on_both_miss_nothing_while_both_write_and_are_killed(self):
        servers, stop, found, sent = self.processes(), threading.Event(), [[], []], []

        def follow(number):
            at = 0
            while True:
                last = stop.is_set()
                rows = patient(lambda: client(number).messages.inbox("c", after_id=at, limit=100))
                found[number] += [(row["id"], row["content"]) for row in rows]
                at = rows[-1]["id"] if rows else at
                if last and not rows:
                    return

        def client(number):
            return nexus.Client(servers[number].url, patience=-1)

        def patient(call):
            for _ in range(400):
                try:
                    return call()
                except (nexus.NexusError, OSError):
                    time.sleep(0.05)            # that server is being started again
            raise AssertionError("it was away for too long")

        def write(number):
            for each in range(60):
                content = "%d-%d" % (number, each)
                patient(lambda: client(number % 2).messages.send("c", content,
                                                                 idempotency_key=content))
                sent.append(content)
        followers = [Started(follow, number) for number in (0, 1)]
        writers = [Started(write, number) for number in range(6)]
        for number in (0, 1):
            until(lambda: len(sent) > 100 * (number + 1))
            servers[number].stop(signal.SIGKILL)
            servers[number] = self.process("--db", self.url, "--quiet")
        for writer in writers:
            writer.result(60)
        stop.set()
        for number, follower in enumerate(followers):
            follower.result(60)
            ids = [message_id for message_id, _ in found[number]]
            self.assertEqual(ids, sorted(set(ids)))
            self.assertEqual(sorted(content for _, content in found[number]), sorted(sent))
        self.assertEqual(len(set(sent)), 360)

    def test_connections_that_are_cut_come_back_and_nothing_answered_is_lost(self):
        one, other = self.two()
        one.client().messages.send("c", "before")
        own = "application_name = 'nexus' AND datname = current_database()"
        self.until_listening()
        for _ in range(3):
            CLUSTER.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE " + own,
                        url=self.url)
            for server in (one, other):         # asked once: no client hides a refusal
                self.expect(server.call("GET", "/api/messages/inbox/c/count"), 200)
                self.expect(server.call("POST", "/api/messages", {
                    "channel": "c", "content": "after"}), 201)
        self.assertEqual(len(other.client().messages.inbox("c")), 7)
        asked = Started(lambda: other.client().messages.inbox("d", wait=60))
        self.until_listening()
        one.client().messages.send("d", "x")
        self.assertEqual(len(asked.result(20)), 1)

    def test_who_listens_again_after_a_cut_looks_at_what_was_missed(self):
        with patched(nexus, "LOOK_SECONDS", 3600):
            one, other = self.two()
            asked = Started(lambda: other.client().messages.inbox("c", wait=60))
            until(lambda: other.store.waiters.parked)
            missed = []
            self.until_listening()
            with patched(other.store.db, "_hear", missed.append):
                one.client().messages.send("c", "x")
                until(lambda: missed)
            CLUSTER.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE query = 'LISTEN nexus' AND datname = current_database()",
                        url=self.url)
            self.assertEqual(len(asked.result(20)), 1)

    def test_many_places_with_the_longest_names_are_told_of(self):
        names = ["\x01" * (nexus.MAX_NAME - 2) + "%02d" % number for number in range(20)]
        with patched(nexus, "LOOK_SECONDS", 3600):
            one, other = self.two()
            asked = [Started(lambda at: other.client().messages.inbox(at, wait=60), name)
                     for name in names]
            until(lambda: other.store.waiters.parked == len(names))
            for name in names:              # all at once: they share what is told
                one.store.waiters.tell(("channel", name))
            one.store.channels.send_many([(nexus.new_message(
                name, "s", "x", None, None, {}, None, [], self.clock.now()), None)
                for name in names]).wait()
            self.assertEqual([len(each.result(20)) for each in asked], [1] * len(names))

    def test_commits_are_synced_and_isolated_as_the_promises_need_it_whatever_the_default(self):
        name = self.url.rpartition("/")[2]
        CLUSTER.run("ALTER DATABASE %s SET synchronous_commit = off" % name,
                    "ALTER DATABASE %s SET default_transaction_isolation = serializable" % name)
        self.addCleanup(CLUSTER.run, "ALTER DATABASE %s RESET ALL" % name)
        server = self.server(db=self.url)
        self.assertEqual(
            [server.store.db._writer.execute("SHOW " + setting).fetchone()[0]
             for setting in ("synchronous_commit", "default_transaction_isolation")],
            ["on", "read committed"])
        server.stop()
        self.assertEqual(CLUSTER.run("SELECT COUNT(*) FROM pg_stat_activity WHERE application_name"
                                     " = 'nexus' AND datname = '%s'" % name), [(0,)])

    def test_the_time_is_postgresqls(self):
        with patched(nexus.time, "time", lambda: 0), patched(nexus.Store, "start", lambda _: None):
            store = nexus.Store(nexus.Settings({"db": self.url}))
        self.addCleanup(store.close)
        self.assertAlmostEqual(store.clock.now() / 1000, time.time(), delta=60)

    def test_a_clock_follows_another_one_slowly(self):
        clock = nexus.Clock(lambda: 1000)
        with patched(clock, "monotonic", lambda frozen=clock.monotonic(): frozen):
            for wall, now in ((1005, 1000010), (995, 1000000), (1000.004, 1000004)):
                clock.follow(wall, 1)
                self.assertAlmostEqual(clock.now(), now, delta=1.5)
        server = self.server(db=self.url, clock=nexus.Clock(lambda: time.time() - 9))
        before = server.store.clock._offset
        server.store.tend()
        self.assertAlmostEqual(server.store.clock._offset - before, 0.01 * nexus.SWEEP_SECONDS)

    def test_a_postgresql_that_is_gone_is_not_asked_by_each_who_waits_behind_the_first(self):
        relay = Relay(re.search(r"@([^/]*)", self.url).group(1))
        self.addCleanup(relay.stop)
        with patched(nexus, "CONNECT_PAUSE", 3600):
            server = self.server(db=self.url.replace(relay.target, "127.0.0.1:%d" % relay.port))
            relay.cut()
            for _ in range(9):
                self.expect(server.call("POST", "/api/messages", {"channel": "c", "content": "x"}),
                            503, "storage_unavailable")
        self.assertLessEqual(relay.refused, 3)      # the writer, and the two of NOTIFY, at once

    def test_without_postgresql_it_says_so_and_comes_back_by_itself(self):
        relay = Relay(re.search(r"@([^/]*)", self.url).group(1))
        self.addCleanup(relay.stop)
        server = self.server(db=self.url.replace(relay.target, "127.0.0.1:%d" % relay.port),
                             sweeping=True, clock=nexus.Clock())
        client = server.client(patience=-1)
        client.messages.send("c", "kept")
        relay.cut()
        for _ in range(2):
            answer = server.call("POST", "/api/messages", {"channel": "c", "content": "x"})
            self.expect(answer, 503, "storage_unavailable")
            self.assertIn("PostgreSQL says", answer.json["message"])
            self.expect(server.call("GET", "/api/messages/inbox/c"), 503, "storage_unavailable")
        until(lambda: server.call("GET", "/health").status == 503)
        relay.go_on()
        until(lambda: server.call("GET", "/health").status == 200)
        self.assertEqual([row["content"] for row in client.messages.inbox("c")], ["kept"])
        client.messages.send("c", "y")
        until(lambda: len(server.lines) == 2)
        self.assertRegex("\n".join(server.lines), "PostgreSQL says.*\n.*The trouble is over")
        server.lines.clear()

    def test_a_server_that_stands_still_in_a_commit_does_not_hold_up_the_others_for_ever(self):
        one, other = self.two()
        with patched(nexus, "POSTGRES_SESSION", nexus.POSTGRES_SESSION.replace("'5s'", "'200ms'")):
            other.store.db._writer.close()
            with one.store.db._writer_lock:
                one.store.db._begin()
                answer = other.call("POST", "/api/messages", {"channel": "c", "content": "x"})
                self.expect(answer, 503, "storage_unavailable")
                one.store.db._rollback()
        self.expect(other.call("POST", "/api/messages", {"channel": "c", "content": "x"}), 201)
        self.assertIn("idle_in_transaction_session_timeout = '10s'", nexus.POSTGRES_SESSION)

    def test_whatever_cannot_work_is_said_in_a_sentence_at_the_start(self):
        database = self.url.rpartition("/")[2]
        owned = self.url
        for url, told in (
                (owned.replace("/" + database, "/no_such_db"), "createdb"),
                (re.sub("//[^@]*@", "//no_such_role@", owned), "createuser"),
                ("postgresql://u:secret@127.0.0.1:1/x", "Look whether PostgreSQL runs there"),
                ("postgresql://u@h/x?nonsense=1", "nonsense"),
                (owned + "?sslmode=require", "SSL")):
            ran = run_nexus(self.folder(), "serve", "--port", "0", "--db", url)
            self.assertEqual((ran.code, ran.json["error"]), (1, "storage_unavailable"), ran)
            self.assertIn(told, ran.json["message"])
            self.assertNotIn("secret", ran.out + ran.err)
            self.assertNotIn("Traceback", ran.err)

    def start_refused(self, told):
        with self.assertRaises(nexus.NexusError) as caught:
            nexus.Postgres(self.url)
        self.assertIn(told, caught.exception.message)

    def test_a_schema_of_others_or_of_a_newer_nexus_is_left_alone(self):
        CLUSTER.run("CREATE SCHEMA nexus", "CREATE TABLE nexus.x (y INT)", url=self.url)
        self.start_refused("belongs to another program")
        CLUSTER.run("DROP SCHEMA nexus CASCADE", url=self.url)
        nexus.Postgres(self.url).close()
        CLUSTER.run("UPDATE nexus.counters SET value = 99 WHERE name = 'schema'", url=self.url)
        self.start_refused("a newer nexus")

    def test_a_role_without_rights_is_told_which_it_needs(self):
        poor = "nexus_test_poor_%d" % os.getpid()
        CLUSTER.run("CREATE ROLE %s LOGIN" % poor)
        self.addCleanup(CLUSTER.run, "DROP ROLE " + poor)
        self.addCleanup(CLUSTER.run, "DROP OWNED BY " + poor, url=self.url)
        rich, self.url = self.url, re.sub("//[^@]*@", "//%s@" % poor, self.url)
        self.start_refused("GRANT CREATE ON DATABASE")
        CLUSTER.run("CREATE SCHEMA nexus AUTHORIZATION " + poor, url=rich)
        nexus.Postgres(self.url).close()        # a schema of its own is enough
        self.url = rich

    def test_several_starts_at_once_make_the_schema_once(self):
        starts = [Started(nexus.Postgres, self.url) for _ in range(6)]
        for start in starts:
            start.result(30).close()

    def test_the_driver_that_is_missing_or_old_is_named_with_the_command_that_gets_it(self):
        for text, told in (("raise ImportError('no libpq')", "no libpq"),
                           ("__version__ = '3.1.9'", "3.1.9 is too old")):
            folder = self.folder()
            with open(os.path.join(folder, "psycopg.py"), "w") as file:
                file.write(text)
            ran = run_nexus(folder, "serve", "--db", "postgresql://h/x",
                            PYTHONPATH=os.pathsep.join((folder, FOLDER)))
            self.assertEqual((ran.code, ran.json["error"]), (1, "storage_unavailable"), ran)
            self.assertRegex(ran.json["message"], told + ".*-m pip install")

    def test_its_name_is_told_and_its_password_is_not(self):
        url = re.sub("//([^@:]*)@", r"//\1:hush@", self.url)
        server = self.process("--db", url)
        client = nexus.Client(server.url)
        self.assertEqual(client.health()["engine"], "postgresql")
        self.assertNotIn("diskFreeBytes", client.stats())
        ran = run_nexus(self.folder(), "doctor", url=server.url)
        self.assertEqual((ran.code, ran.json["health"][0]["engine"]), (0, "postgresql"))
        code, said = server.stop()
        self.assertEqual((code, "hush" in said, "postgresql://" in said), (0, False, True))


@unittest.skipUnless(os.environ.get("NEXUS_TEST_POSTGRES_CTL"),
                     "NEXUS_TEST_POSTGRES_CTL names no pg_ctl of a cluster of one's own")
class Stopped(Case):
    """PostgreSQL itself crashes and starts again, with two servers at work on it."""

    def control(self, *words):
        subprocess.run([os.environ["NEXUS_TEST_POSTGRES_CTL"], *words], check=True, timeout=60,
                       stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    def test_nothing_answered_is_lost_and_the_servers_come_back_by_themselves(self):
        url = CLUSTER.database(self.id())
        servers = [self.process("--db", url, "--quiet") for _ in range(2)]
        sent, refused, stop = [], [], threading.Event()

        def write(number):
            client = nexus.Client(servers[number % 2].url, patience=-1)
            while not stop.is_set():
                content = "%d-%d" % (number, len(sent))
                try:
                    client.messages.send("c", content)
                    sent.append(content)
                except nexus.NexusError as refusal:
                    refused.append(refusal.code)
                    time.sleep(0.02)
        writers = [Started(write, number) for number in range(4)]
        for _ in range(3):
            before = len(sent)
            until(lambda: len(sent) > before + 200)
            self.control("-m", "immediate", "stop")
            until(lambda: all(nexus_is(server, 503) for server in servers))
            self.control("start")
            began = time.monotonic()
            until(lambda: all(nexus_is(server, 200) for server in servers))
            self.assertLess(time.monotonic() - began, 5)        # seconds, as README promises
        stop.set()
        for writer in writers:
            writer.result(30)
        self.assertEqual(set(refused), {"storage_unavailable"})
        at, kept = 0, []
        while True:
            rows = nexus.Client(servers[0].url).messages.inbox("c", after_id=at, limit=500)
            kept += [row["content"] for row in rows]
            if not rows:
                break
            at = rows[-1]["id"]
        self.assertEqual(set(sent) - set(kept), set())


def nexus_is(server, status):
    """Does this server's /health answer with that status?"""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == status
    finally:
        connection.close()


class Relay:
    """A port behind which something listens; cut() and nobody does, until go_on()."""

    def __init__(self, target):
        host, _, port = target.partition(":")
        self.target, self._address = target, (host, int(port or 5432))
        self._listening, self._pairs = socket.create_server(("127.0.0.1", 0)), []
        self.port, self._open = self._listening.getsockname()[1], True
        self.refused = 0                # how many wanted in while it was cut
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        while True:
            try:
                client = self._listening.accept()[0]
            except OSError:
                return
            if not self._open:
                self.refused += 1
                client.close()
                continue
            server = socket.create_connection(self._address)
            self._pairs += [client, server]
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=(one, other), daemon=True).start()

    @staticmethod
    def _copy(one, other):
        with contextlib.suppress(OSError):
            while True:
                data = one.recv(65536)
                if not data:
                    break
                other.sendall(data)
        for each in (one, other):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self):
        """Everybody is thrown out, and nobody gets in."""
        self._open = False
        for each in self._pairs:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def go_on(self):
        """Whoever comes is let in again."""
        self._open = True

    def stop(self):
        """The port is gone, too."""
        self.cut()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for each in self._pairs:
            each.close()


# ----------------------------------------------------------------------------------------
# Fuzzing
#
# Seeded and bounded: the same bytes every time, a second of them in each test run, as many minutes
# as wanted with `fuzz --minutes N`. Whatever comes in, the server answers 4xx or 2xx or closes; it
# never answers 5xx, never logs a fault of its own, and serves the next client. What it finds gets a
# line in FOUND, so that it is tried for ever.
# ----------------------------------------------------------------------------------------

FOUND = (
    b"GET /v1/pair/%ff/status HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /api/messages/inbox/c?afterId=99999999999999999999 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"POST /mcp HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n[]",
)


class Fuzzer:
    """Requests that are nearly right, from a seed."""

    VALUES = (None, True, False, 0, -1, 1, 2 ** 63, 1e308, "", "x", "a" * 300, "\0", "\u00fc", "1",
              "\U0001F600", [], [1], {}, {"a": {"b": []}}, "system", {"replyTo": 5}, "[REDACTED:x]")
    PIECES = (b"\r\n", b"\r", b"\n", b":", b" ", b"\0", b"\xff", b"%", b"%ff", b"/", b"//", b"..",
              b"HTTP/1.1", b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Host: localhost",
              b"0\r\n\r\n", b"ffffffff\r\n", b"-1", b"Expect: 100-continue", b"{", b"[" * 200)

    def __init__(self, seed):
        self.random = random.Random(seed)

    def json(self, entry):
        """A body for an operation, with fields that are right, wrong or missing."""
        body = {field.name: self.random.choice(self.VALUES) for field in entry.fields
                if field.source == "body" and self.random.random() < 0.8 and field.name != "wait"}
        text = json.dumps(body, ensure_ascii=self.random.random() < 0.5)
        if self.random.random() < 0.1:
            cut = self.random.randrange(len(text) + 1)
            text = text[:cut] + self.random.choice(("NaN", "\\ud800", '"\\ud800"', "}", "\u00e9", ""
                                                    )) + text[cut:]
        return text.encode("utf-8", "surrogatepass")

    def request(self):
        """The bytes of one request; now and then they are damaged."""
        entry = self.random.choice([entry for entry in nexus.OPERATIONS if entry.path])
        path = re.sub(r"{\w+}", lambda _: self.random.choice(
            ("1", "c", "%00", "%2f", "a%20b", "%ff", "-1", "9" * 30, "0" * 48)), entry.path)
        query = "&".join(
            "%s=%s" % (field.name, self.random.choice(("", "1", "-1", "%zz", "9" * 25)))
                         for field in entry.fields if field.source == "query"
                         and field.name != "wait" and self.random.random() < 0.5)
        body = self.json(entry) if entry.method in ("POST", "PUT") else b""
        head = "%s %s%s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\nX-Agent-Id: %s\r\n" % (
            entry.method, path, "?" + query if query else "", len(body),
            self.random.choice(("ada", "", "system", "a b", "x" * 200)))
        data = head.encode() + b"Connection: close\r\n\r\n" + body
        while self.random.random() < 0.3:
            place = self.random.randrange(len(data))
            data = data[:place] + self.random.choice(self.PIECES) + data[
                place + self.random.randrange(4):]
        return data

    def line(self):
        """The bytes of one line for the MCP reader."""
        message = {"jsonrpc": "2.0", "id": self.random.choice(self.VALUES), "method":
                   self.random.choice(("ping", "initialize", "tools/list", "tools/call", "x", 5)),
                   "params": self.random.choice((None, [], {}, {"name": "tx_inbox"}, {
                       "name": "nope", "arguments": {}}, {"_meta": 5}, {"_meta": {
                           nexus.MCP_META: self.random.choice(self.VALUES)}}))}
        data = json.dumps(message).encode()
        if self.random.random() < 0.3:
            place = self.random.randrange(len(data))
            data = data[:place] + self.random.choice((b"\xff", b"{", b"\"", b"\\", b"")) + data[
                place + 1:]
        return data


def fuzz_server(server, fuzzer, data):
    """Send bytes; returns a sentence if the answer is one that must not be."""
    answer = server.raw(data, timeout=0.05, half_close=True)
    if answer and not re.match(rb"HTTP/1\.1 (100|[24]\d\d|503) ", answer):
        return "answered %r" % answer[:80]
    if server.lines:
        return "logged %r" % server.lines.pop()
    return None


def fuzz_line(data):
    """Feed the MCP dispatcher; returns a sentence if the answer is not JSON-RPC."""
    out = io.BytesIO()
    nexus.StdioMcp(nexus.LocalTools(None, lambda _: nexus.Client("http://127.0.0.1:1", sleep=(
        lambda _: None))), io.BytesIO(data.replace(b"\n", b" ") + b"\n"), out).run()
    for line in out.getvalue().splitlines():
        found = json.loads(line.decode("utf-8"))
        if found.get("jsonrpc") != "2.0" or found.get("error", {}).get("code") == -32603:
            return "answered %r" % line
    return None


def fuzz(argv):
    """The command `fuzz --minutes N [--seed S]`: exit 0 if nothing was found."""
    minutes = float(argv[argv.index("--minutes") + 1]) if "--minutes" in argv else 1.0
    seed = int(argv[argv.index("--seed") + 1]) if "--seed" in argv else int(time.time())
    fuzzer, ends, count = Fuzzer(seed), time.monotonic() + 60 * minutes, 0
    print("seed %d, %g minute(s)" % (seed, minutes), flush=True)
    with Server(rate_limit=0) as server:
        while time.monotonic() < ends:
            data, line = fuzzer.request(), fuzzer.line()
            for found, what in ((fuzz_server(server, fuzzer, data), data), (fuzz_line(line), line)):
                if found:
                    print("%s\nto %r\nAdd it to FOUND." % (found, what))
                    return 1
            count += 2
    print("%d inputs, nothing found" % count)
    return 0


class Fuzzing(Case):
    """A second of fuzzing with a fixed seed, and all that was ever found."""

    def test_requests(self):
        server, fuzzer, ends = self.server(rate_limit=0), Fuzzer(7), time.monotonic() + 1
        for number in range(400):
            data = FOUND[number] if number < len(FOUND) else fuzzer.request()
            self.assertIsNone(fuzz_server(server, fuzzer, data), data)
            if number >= 100 and time.monotonic() > ends:
                break
        self.expect(server.call("GET", "/health"), 200)

    def test_mcp_lines(self):
        fuzzer = Fuzzer(7)
        for _ in range(300):
            line = fuzzer.line()
            self.assertIsNone(fuzz_line(line), line)


# ----------------------------------------------------------------------------------------
# Counterparts
#
# Programs of other people, where `.ci/run` or you have put them: the environment variables
# NEXUS_TEST_MCP1 and NEXUS_TEST_MCP2 name a Python that has the official MCP SDK (1.x, 2.x),
# NEXUS_TEST_SCHEMATHESIS the schema fuzzer.
# ----------------------------------------------------------------------------------------

MCP_CONVERSATION = r"""
import asyncio, json, os, sys
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

async def agent(home, work):
    parameters = StdioServerParameters(command=sys.argv[1], args=[sys.argv[2], "mcp", "--url",
        sys.argv[3]], env=dict(os.environ, HOME=home, USERPROFILE=home))
    async with stdio_client(parameters) as (reader, writer):
        async with ClientSession(reader, writer) as session:
            await session.initialize()
            async def call(name, **arguments):
                result = await session.call_tool(name, arguments)
                failed = getattr(result, "isError", None) or getattr(result, "is_error", None)
                assert not failed, result
                return json.loads(result.content[0].text)
            return await work(session, call)

async def main():
    home = sys.argv[4]
    async def ada(session, call):
        tools = (await session.list_tools()).tools
        assert len(tools) >= 14, tools
        made = await call("nexus_create", creatorAgentId="ada", greeting="Hello")
        return made["sessionId"], (await call("nexus_pair", sessionId=made["sessionId"]))["code"]
    session_id, code = await agent(home + "/ada", ada)
    async def bob(session, call):
        await call("nexus_claim", code=code, agentId="bob")
        polled = await call("nexus_poll", sessionId=session_id)
        assert [m["text"] for m in polled["messages"]] == ["Hello"], polled
        await call("nexus_send", sessionId=session_id, text="Hi Ada")
        sent = await call("tx_send", channel="c", content="kept")
        assert (await call("tx_inbox", channel="c"))["messages"][0]["sender"] == "mcp"
        await call("tx_ack", id=sent["id"])
        assert (await call("tx_outbox_pending", channel="c"))["count"] == 0
    await agent(home + "/bob", bob)
    async def again(session, call):
        polled = await call("nexus_poll", sessionId=session_id, wait=1)
        assert polled["messages"][-1] ["verified"] is True, polled
        assert polled["messages"][-1]["text"] == "Hi Ada", polled
    await agent(home + "/ada", again)
    print("done")

asyncio.run(main())
"""


class Counterparts(Case):
    """Other people's programs against ours."""

    def converse(self, variable):
        python = os.environ.get(variable)
        if not python:
            self.skipTest("%s names no Python with the MCP SDK" % variable)
        server, home = self.server(), self.folder()
        done = subprocess.run([python, "-c", MCP_CONVERSATION, sys.executable, NEXUS, server.url,
                               home], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120,
                              stdin=subprocess.DEVNULL)
        self.assertEqual(done.stdout.decode().strip(), "done", done.stderr.decode()[-3000:])

    def test_the_official_mcp_sdk_1(self):
        self.converse("NEXUS_TEST_MCP1")

    def test_the_official_mcp_sdk_2(self):
        self.converse("NEXUS_TEST_MCP2")

    def test_schemathesis_finds_no_500_and_no_answer_that_breaks_its_schema(self):
        tool = os.environ.get("NEXUS_TEST_SCHEMATHESIS")
        if not tool:
            self.skipTest("NEXUS_TEST_SCHEMATHESIS names no schemathesis")
        server, folder = self.server(rate_limit=0), self.folder()
        with open(os.path.join(folder, "schemathesis.toml"), "w") as file:
            # A long poll is not what is tested here, and 413 is a refusal, too.
            file.write("[parameters]\nwait = 0\n[checks]\nnegative_data_rejection."
                       "expected-statuses = ['4xx', '5xx']\n")
        checks = ("not_a_server_error,status_code_conformance,content_type_conformance,"
                  "response_schema_conformance,negative_data_rejection")
        done = subprocess.run([tool, "run", server.url + "/openapi.json", "--checks", checks,
                               "--max-examples", "20", "--seed", "1", "--phases",
                               "coverage,fuzzing", "--exclude-path-regex", "/lease$",
                               "--no-color"], cwd=folder, timeout=300, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout.decode()[-4000:])


# ----------------------------------------------------------------------------------------
# Benchmark
#
# A speed is worth stating only as a ratio to something known, measured beside it in the same run:
# absolute numbers age with the machine, ratios hold. The known thing is the floor, the best that a
# normal user of the standard library gets from http.server with a handler that does nothing.
# Rounds alternate (floor, ours, floor, ours …), so a machine that slows down slows both. The
# client is a process of its own that only copies prepared bytes and checks every status and length:
# a refusal is fast, and uncounted it would look like speed. It never asserts; it prints a table.
# ----------------------------------------------------------------------------------------


Row = collections.namedtuple("Row", "name work sign limit unit")
ROWS = [
    Row("send", "durable channel send, 16 connections", ">=", 1.0, "x floor"),
    Row("session", "session send with key, 4 x 4 agents", ">=", 0.9, "x floor"),
    Row("inbox", "inbox read of 10 messages, 16 connections", ">=", 0.8, "x floor"),
    Row("wake", "send -> waiting long poll has it", "<=", 1.5, "x send alone"),
    Row("million", "reading a channel of {stored:,}, not 1,000", "<=", 1.2, "x time"),
    Row("expiry", "p99 of sends while {stored:,} expire", "<=", 3.0, "x quiet"),
    Row("held", "{parked:,} long polls held and woken", ">=", 1.0, "of all"),
    Row("parked", "sends with {parked:,} polls parked", ">=", 0.7, "x without"),
    Row("parked-rss", "memory with {parked:,} polls parked", "<=", 600, "MiB"),
    Row("follow", "line on a follower's stdout, less the send", "<=", 2.0, "ms"),
    Row("batch", "messages in batches of 100, 4 connections", ">=", 4.0, "x single, 16"),
    Row("kept", "counts by a client that keeps its connection", ">=", 2.0, "x anew"),
    Row("launcher", "`send` by the launcher less a bare Python -S", "<=", 0.6, "x bash"),
    Row("cli-send", "process of `send` less a bare Python's", "<=", 1.0, "x bash"),
    Row("cli-tx", "process of `tx send` less a bare Python's", "<=", 1.0, "x bash"),
    Row("postgres", "durable channel send on PostgreSQL, one server", ">=", 0.25, "x SQLite"),
    Row("postgres-2", "the same through two servers", ">=", 0.25, "x SQLite"),
    Row("idle", "memory of an idle server", "<=", 30, "MiB"),
    Row("growth", "growth from 20,000 to {growth:,} requests", "<=", 4, "MiB"),
    Row("stored", "growth with {stored:,} messages stored, read", "<=", 16, "MiB"),
]
# rounds: pairs of measurements; seconds: length of one; turns: polls woken, and reads per position,
# in a round; watch: seconds after the expiry, of which the contract allows the purge ten.
Sizes = collections.namedtuple("Sizes", "rounds seconds turns watch stored growth parked")
FULL = Sizes(5, 1.5, 200, 15, 1000000, 200000, 10000)  # about 5 minutes on 2 cores
QUICK = Sizes(3, 0.7, 60, 8, 100000, 100000, 2000)  # about 1 minute

LANES = 16  # keep-alive connections of a throughput row, as in `wrk -c 16`
FILL_LANES = 64  # and while filling, where only the total counts
CHUNK = 20000  # messages sent between two looks at clock and memory
FILL_SECONDS = 200  # a slower server gets fewer messages, and the row says how many
VARIANTS = 32  # different messages a connection cycles through: no cache shall look good
WARM_UP = 0.3  # seconds at the head of each measurement that don't count
PAUSE = 0.003  # seconds before a timed send, so that the long poll is surely parked
PARK_PAUSE = 0.001  # between two polls: a full accept queue costs a second per lost SYN
STUCK = 20  # seconds without any answer after which a server counts as hung
STARTS = 15  # interleaved starts of each command; one takes 20 to 100 ms
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*\r\n", re.IGNORECASE)

# What a bash client does for one send: alias, agent, key and server are read, a body is built, one
# curl, status and body are taken apart, the answer is checked and printed.
BASH_SEND = r"""set -euo pipefail
sid=$(jq -r --arg name "$1" '.[$name] // $name' "$HOME/.config/messaging/aliases.json")
state="$HOME/.config/messaging/sessions/$sid"
agent=$(tr -d '\n' < "$state/agent")
key=$(tr -d '\n' < "$state/key")
url=$(cat "$state/server")
body=$(jq -nc --arg text "$2" '{text: $text}')
answer=$(curl -sS -m 10 -w '\n%{http_code}' -X POST "$url/v1/sessions/$sid/messages" \
  -H 'Content-Type: application/json' -H "X-Agent-Id: $agent" -H "X-Session-Key: $key" -d "$body")
[ "${answer##*$'\n'}" = 201 ]
body=$(sed '$d' <<< "$answer")
jq -e .ok <<< "$body" > /dev/null
jq . <<< "$body" """


def tell(text):
    """One line of progress on stderr; stdout belongs to the result."""
    print(text, file=sys.stderr, flush=True)


# ---- the load generator: prepared bytes out, counted bytes in


def bench_request(method, path, body=None, **headers):
    """The bytes of one HTTP/1.1 request, a `body` as JSON; no header that isn't needed."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = ["%s %s HTTP/1.1" % (method, path), "Host: 127.0.0.1"]
    if body is not None:
        lines += ["Content-Type: application/json", "Content-Length: %d" % len(data)]
    lines += ["%s: %s" % (name.replace("_", "-"), value) for name, value in headers.items()]
    return "\r\n".join(lines + ["", ""]).encode() + data


def answer_is_whole(data):
    """Whether `data` is one whole answer; ValueError if it can't become exactly one."""
    head = data.find(b"\r\n\r\n")
    if head < 0:
        return False
    length = LENGTH.search(data, 0, head + 2)
    if not length or not data.startswith(b"HTTP/1.1 "):
        raise ValueError("not an answer with a Content-Length: %r" % data[:200])
    missing = head + 4 + int(length.group(1)) - len(data)
    if missing < 0:
        raise ValueError("%d bytes more than the Content-Length" % -missing)
    return missing == 0


class Lane:
    """One keep-alive connection, used by one thread, with the requests it cycles through."""

    def __init__(self, port, requests=()):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=70)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.requests = itertools.cycle(requests)
        self.send, self.fileno = self.socket.sendall, self.socket.fileno
        self.since = 0.0  # when the request under way was sent, by perf_counter
        self.data = b""  # what has come of its answer

    def send_next(self, now):
        """Send the next prepared request."""
        self.data, self.since = b"", now
        self.send(next(self.requests))

    def read_some(self):
        """Take what has arrived; True when the answer is whole (it is in `data`)."""
        piece = self.socket.recv(65536)
        if not piece:
            raise ConnectionError("closed by the server after %r, %.1f s after the request" % (
                self.data[:200], time.perf_counter() - self.since))
        self.data += piece
        return answer_is_whole(self.data)

    def receive(self):
        """(status, body) of the next answer, however long it takes."""
        self.data = b""
        while not self.read_some():
            pass
        return int(self.data[9:12]), self.data.partition(b"\r\n\r\n")[2]

    def call(self, method, path, body=None, **headers):
        """Send, receive and parse; for preparations, so anything but 2xx is an error."""
        self.send(bench_request(method, path, body, **headers))
        status, data = self.receive()
        if status // 100 != 2:
            raise RuntimeError("%s %s: %d %s" % (method, path, status, data[:300].decode()))
        return json.loads(data)


# What a load saw: for each answer when it ended and how long it took (seconds by perf_counter,
# which all processes share), the span that counts, statuses but 2xx, CPU share of the client.
Load = collections.namedtuple("Load", "ended took begin stop bad busy")


def drive(_pipe, port, lanes, seconds, count):
    """Closed loop: each lane (a list of requests) is one connection that sends its next request as
    soon as the last is answered, for `seconds` or `count` requests. Every answer is waited for.
    Several ports are taken by turns."""
    clock, ended, took = time.perf_counter, array.array("d"), array.array("d")
    bad, selector = collections.Counter(), selectors.DefaultSelector()
    connections = [Lane(one, lane) for one, lane in zip(itertools.cycle(port), lanes)]
    begin, cpu = clock(), time.process_time()
    stop, left = begin + seconds, count - len(lanes)
    for connection in connections:
        selector.register(connection, selectors.EVENT_READ, connection)
        connection.send_next(clock())
    while selector.get_map():
        ready = selector.select(STUCK)
        if not ready:
            raise TimeoutError("%d requests without an answer for %d s" % (
                len(selector.get_map()), STUCK))
        for connection in [key.data for key, _ in ready]:
            if not connection.read_some():
                continue
            now = clock()
            ended.append(now)
            took.append(now - connection.since)
            if connection.data[9:10] != b"2":
                bad[connection.data[9:12].decode()] += 1
            if now < stop and left > 0:
                left -= 1
                connection.send_next(now)
            else:  # done: that the server may close an idle connection is no failure
                selector.unregister(connection)
    busy = (time.process_time() - cpu) / (clock() - begin)
    return Load(ended, took, begin + WARM_UP, stop, bad, busy)


def rate_of(load):
    """Answers a second between warm-up and stop."""
    first, last = (bisect.bisect_left(load.ended, moment) for moment in (load.begin, load.stop))
    return (last - first) / (load.stop - load.begin)


def p99(load, begin=0.0, end=math.inf):
    """The seconds within which 99% of the answers came that ended in that time, after the warm-up;
    not a number when there were none."""
    begin = max(begin, load.begin)
    took = sorted(took for ended, took in zip(load.ended, load.took) if begin <= ended < end)
    return took[int(len(took) * 0.99)] if took else math.nan


def hold_polls(pipe, port, requests):
    """Park one long poll per request, and again when its wait is over. Tells the pipe when all are
    sent, and at any question: how many are parked, how many were woken, why others were lost."""
    selector, woken, lost = selectors.DefaultSelector(), 0, collections.Counter()
    for text in requests:
        connection = Lane(port, [text])
        connection.send_next(0)
        selector.register(connection, selectors.EVENT_READ, connection)
        time.sleep(PARK_PAUSE)
    selector.register(pipe, selectors.EVENT_READ)
    pipe.send("parked")
    while True:
        for connection in [key.data for key, _ in selector.select()]:
            if connection is None:  # the pipe; its EOFError ends this process with its parent
                pipe.recv()
                pipe.send((len(selector.get_map()) - 1, woken, lost))
                continue
            try:
                status, body = connection.receive()
            except OSError as error:
                status, body = type(error).__name__, b""
            if status == 200 and not json.loads(body)["messages"]:
                connection.send_next(0)
                continue
            selector.unregister(connection)  # parked again it would be answered at once, for ever
            if status == 200:
                woken += 1
            else:
                lost[str(status)] += 1


# ---- the processes: floor, worker, server


class FloorHandler(http.server.BaseHTTPRequestHandler):
    """The floor: stock parsing, keep-alive, no Nagle, one write per answer, a little JSON."""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # buffered: headers and body leave in one write

    def do_POST(self):
        """Parse the body, keep nothing, answer."""
        json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"ok": True, "id": 1}).encode()
        self.send_response(201)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args):
        """The stock handler writes a line per request to stderr; that would not be a floor."""


def serve_floor(pipe):
    """Worker: tell the port, then serve until terminated."""
    http.server.ThreadingHTTPServer.request_queue_size = 128  # 5 would refuse connections
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FloorHandler) as server:
        pipe.send(server.server_address[1])
        server.serve_forever()


def bench_work(pipe, function, arguments):
    """The main function of a worker process: the result, or the exception, goes to the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked child inherits the parent's handler
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            pipe.send(function(pipe, *arguments))
        except Exception as error:  # whatever it is, the parent should name it
            pipe.send(RuntimeError("%s: %s" % (type(error).__name__, error)))


class Worker:
    """`function(pipe, *arguments)` in a process of its own."""

    def __init__(self, function, *arguments):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(
            target=bench_work, args=(theirs, function, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def result(self, seconds=180):
        """The next thing the worker reports; RuntimeError if it failed or says nothing."""
        if not self.pipe.poll(seconds):
            raise RuntimeError("the load generator hung")
        value = self.pipe.recv()
        if isinstance(value, Exception):
            raise value
        return value

    def close(self):
        """End the process, whatever it does."""
        self.process.terminate()
        self.process.join()
        self.pipe.close()


PSYCOPG = {"PYTHONPATH": CLUSTER.path} if CLUSTER.path else {}


def bench_environment(folder, **more):
    """The environment without the user's settings, with a home of our own."""
    kept = {name: value for name, value in os.environ.items()
            if not name.startswith(("NEXUS_", "TX_", "XDG_"))}
    return dict(kept, HOME=folder, USERPROFILE=folder, **more)


class BenchServer:
    """`nexus.py serve` on a fresh database in `folder`, or on `url`, with its log beside it."""

    def __init__(self, folder, name, url=None):
        self.db, log = pathlib.Path(folder, name + ".db"), pathlib.Path(folder, name + ".log")
        command = [sys.executable, NEXUS, "serve", "--port", "0", "--db",
                   url or str(self.db), "--rate-limit", "0", "--quiet"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder,
                                            env=bench_environment(folder, **PSYCOPG),
                                            stdin=subprocess.DEVNULL)
        try:
            self.url, self.port = self.find_url(log)
        except BaseException:  # Ctrl-C as well: nobody else knows of this process yet
            self.close()
            raise

    def find_url(self, log):
        """(URL, port) from what the server printed within 15 seconds."""
        end = time.monotonic() + 15
        while True:
            text = log.read_text(errors="replace")
            found = re.search(r"(http://127\.0\.0\.1:(\d+))\D", text)
            if found:
                return found.group(1), int(found.group(2))
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the server did not start: " + " ".join(text.split())[-200:])
            time.sleep(0.02)

    def rss(self):
        """Resident memory in MiB, NaN where there is no /proc."""
        with contextlib.suppress(OSError):
            status = pathlib.Path("/proc/%d/status" % self.process.pid).read_text()
            return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) / 1024
        return math.nan

    def used_pages(self):
        """Pages of the database that hold something; it asks SQLite and needs no schema."""
        name = self.db.as_uri() + "?mode=ro"
        with contextlib.closing(sqlite3.connect(name, uri=True, timeout=1)) as db:
            return (db.execute("PRAGMA page_count").fetchone()[0]
                    - db.execute("PRAGMA freelist_count").fetchone()[0])

    def close(self):
        """Ask it to stop; after five seconds make it."""
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


# ---- the run: what was asked for, what is running, what came out


class BenchRun:
    """One run of the benchmark. What a stage starts is closed when its `stack` closes."""

    def __init__(self, sizes, names, folder):
        self.sizes, self.names, self.folder = sizes, names, folder
        self.results, self.stack = {}, contextlib.ExitStack()
        self.bad, self.busy = collections.Counter(), 0.0  # of the stage; of the busiest client

    def keep(self, thing):
        """Close `thing` when the stage ends, however it ends."""
        self.stack.callback(thing.close)
        return thing

    def load(self, port, lanes, seconds=math.inf, count=sys.maxsize, watch=None):
        """Drive the lanes from a process of its own; `watch()` is called every 0.1 s meanwhile."""
        port = port if isinstance(port, tuple) else (port,)
        with contextlib.closing(Worker(drive, port, lanes, seconds, count)) as worker:
            while watch and not worker.pipe.poll(0.1):
                watch()
            load = worker.result()
        self.bad.update(load.bad)
        self.busy = max(self.busy, load.busy)
        return load

    def compare(self, name, base, ours, many=1):
        """Record a throughput row; `base` and `ours` are (port, lanes), measured by turns.

        Each request of ours counts as `many`.
        """
        pairs = []
        for number in range(self.sizes.rounds):
            pairs.append([times * rate_of(self.load(*side, seconds=self.sizes.seconds + WARM_UP))
                          for side, times in ((ours, many), (base, 1))])
            tell("  %-8s round %d: %6.0f/s, base %6.0f/s" % (name, number + 1, *pairs[-1]))
        self.record_pairs(name, pairs, "{:,.0f}/s, base {:,.0f}/s")

    def record_pairs(self, name, pairs, note):
        """A row's result from (ours, base) of each round: the median of their ratios."""
        medians = map(statistics.median, zip(*pairs))
        self.record(name, [ours / base for ours, base in pairs], note=note.format(*medians))

    def record(self, name, values, value=None, note=""):
        """A row's result: the median of `values` unless a pooled `value` is given, their spread."""
        value = statistics.median(values) if value is None else value
        if math.isnan(value):
            return self.skip(name, "can't be measured here")
        row = next(row for row in ROWS if row.name == name)
        self.results[name] = {"measured": value, "min": min(values), "max": max(values),
                              "note": note,
                              "ok": value >= row.limit if row.sign == ">=" else value <= row.limit}
        return None

    def skip(self, name, why):
        """A row that can't be measured here."""
        self.results[name] = {"ok": None, "note": "skipped: " + why}

    def stage(self, function, names):
        """One stage; its failure is the result of its rows and does not end the run."""
        tell("%s …" % ", ".join(name for name in names if name in self.names))
        self.bad.clear()
        try:
            with self.stack:
                function(self)
        except Exception as error:
            tell("  failed: %r" % error)
            for name in set(names).difference(self.results):
                self.results[name] = {"ok": False, "note": "failed: %s" % error}
        for name in set(names).intersection(self.results) if self.bad else ():
            self.results[name]["ok"] = False  # the numbers are about something else
            self.results[name]["note"] += " NOT 2xx: %s" % dict(self.bad)


# ---- the stages: each prepares a server of its own and records its rows


def prose(number):
    """An ordinary message of about 110 bytes, different for each number."""
    return ("Build %d passed on main: 214 tests in 38 s, two skipped. The artifacts are in the "
            "usual place, please review." % number)


def channel_lanes(channel, count, **fields):
    """`count` lanes of sends to one channel, each with its own sender."""
    return [[bench_request("POST", "/api/messages", dict(
        fields, channel=channel, sender="agent-%d" % lane, content=prose(lane * VARIANTS + number)))
        for number in range(VARIANTS)] for lane in range(count)]


def join_agents(server, sessions, agents):
    """[(session id, agent, key), …] of fresh sessions with that many members each."""
    wire, members = Lane(server.port), []
    for _ in range(sessions):
        session = wire.call("PUT", "/v1/sessions", {})["sessionId"]
        for agent in ("agent-%d" % number for number in range(agents)):
            path = "/v1/sessions/%s/join" % session
            key = wire.call("POST", path, {}, X_Agent_Id=agent)["sessionKey"]
            members.append((session, agent, key))
    return members


def stage_throughput(run):
    """The three rows against the floor, 16 keep-alive connections each. Four sessions, because one
    may keep 100,000 messages and a full run sends more."""
    server, worker = run.keep(BenchServer(run.folder, "throughput")), run.keep(Worker(serve_floor))
    floor = worker.result(10), channel_lanes("floor", LANES)
    for port in (floor[0], server.port):  # the first second of a process is not its speed
        run.load(port, floor[1], seconds=1)
    if "send" in run.names:
        run.compare("send", floor, (server.port, channel_lanes("builds", LANES)))
    if "session" in run.names:
        run.compare("session", floor, (server.port, [[bench_request(
            "POST", "/v1/sessions/%s/messages" % session, {"text": prose(number)},
            X_Agent_Id=agent, X_Session_Key=key) for number in range(VARIANTS)]
            for session, agent, key in join_agents(server, 4, LANES // 4)]))
    if "inbox" in run.names:
        wire, path = Lane(server.port), "/api/messages/inbox/ten?limit=10"
        for number in range(12):
            wire.call("POST", "/api/messages", {"channel": "ten", "content": prose(number)})
        if len(wire.call("GET", path)["messages"]) != 10:
            raise RuntimeError("the inbox did not give 10 messages")
        run.compare("inbox", floor, (server.port, [[bench_request("GET", path)]] * LANES))


def stage_follow(run):
    """From a send to the line that a `tx inbox --follow` of another process prints of it."""
    server, sender = run.keep(BenchServer(run.folder, "follow")), None
    sender, gaps = Lane(server.port), []
    process = subprocess.Popen(
        COMMAND + ["tx", "inbox", "seen", "--follow", "--json"], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=clean_environment(run.folder, NEXUS_URL=server.url))
    run.stack.callback(process.wait)
    run.stack.callback(process.stdout.close)
    run.stack.callback(process.terminate)
    requests = channel_lanes("seen", 1)[0]
    sender.call("POST", "/api/messages", {"channel": "seen", "content": "first"})
    process.stdout.readline()           # it is up
    for _ in range(run.sizes.rounds):
        times = []
        for turn in range(run.sizes.turns):
            time.sleep(PAUSE)
            alone = microseconds(sender, requests[turn % VARIANTS], sender)
            begin = time.perf_counter()
            process.stdout.readline()   # of the send just measured: it may be here already
            times.append((time.perf_counter() - begin) * 1e3)
            if not alone:
                raise RuntimeError("the send took no time")
        gaps.append(statistics.median(times))
    run.record("follow", gaps)


def stage_batch(run):
    """Messages a second, many in a request against one in each."""
    server, count = run.keep(BenchServer(run.folder, "batch")), 100
    batches = [[bench_request("POST", "/api/messages/batch", {"messages": [
        {"channel": "many", "content": prose(number + each)} for each in range(count)]})
        for number in range(VARIANTS)] for lane in range(4)]
    run.compare("batch", (server.port, channel_lanes("single", LANES)), (server.port, batches),
                count)


def stage_postgres(run):
    """Sends to PostgreSQL through one server and through two, against SQLite in the same run."""
    if CLUSTER.why:
        for name in ("postgres", "postgres-2"):
            run.skip(name, CLUSTER.why)
        return
    run.stack.callback(CLUSTER.close)
    url, lanes = CLUSTER.database("bench"), channel_lanes("builds", LANES)
    plain = run.keep(BenchServer(run.folder, "sqlite"))
    ports = tuple(run.keep(BenchServer(run.folder, name, url)).port for name in ("pg1", "pg2"))
    for port in (plain.port, ports):            # the first second of a process is not its speed
        run.load(port, lanes, seconds=1)
    run.compare("postgres", (plain.port, lanes), (ports[0], lanes))
    run.compare("postgres-2", (plain.port, lanes), (ports, lanes))


def stage_kept(run):
    """Requests a second of nexus.Client, in this process, with its connection kept and without.

    Requests that wait for no disk, which would be most of the time of both.
    """
    server, pairs = run.keep(BenchServer(run.folder, "kept")), []
    for number in range(run.sizes.rounds):
        rates = []
        for keep in (True, False):
            client, count = nexus.Client(server.url), 0
            begin = time.perf_counter()
            while time.perf_counter() < begin + run.sizes.seconds:
                client.messages.pending("kept")
                count += 1
                if not keep:
                    client.close()
            rates.append(count / (time.perf_counter() - begin))
            client.close()
        pairs.append(rates)
        tell("  %-8s round %d: %6.0f/s, anew %6.0f/s" % ("kept", number + 1, *rates))
    run.record_pairs("kept", pairs, "{:,.0f}/s, anew {:,.0f}/s")


def microseconds(sender, text, receiver, pause=0.0):
    """Time from a send until `receiver` has its answer; after a pause, to start from rest."""
    time.sleep(pause)
    begin = time.perf_counter()
    sender.send(text)
    receiver.receive()
    return (time.perf_counter() - begin) * 1e6


def stage_wake(run):
    """One sender, one waiter: a send that wakes and a send alone, by turns, after equal pauses."""
    server, last, pairs = run.keep(BenchServer(run.folder, "wake")), 0, []
    sender, waiter = Lane(server.port), Lane(server.port)
    wakes, alone = (channel_lanes(name, 1)[0] for name in ("wake", "alone"))
    for _ in range(run.sizes.rounds):
        times = []
        for turn in range(run.sizes.turns):
            waiter.send(bench_request("GET", "/api/messages/inbox/wake?afterId=%d&wait=10" % last))
            woken = microseconds(sender, wakes[turn % VARIANTS], waiter, PAUSE)
            last = json.loads(sender.receive()[1])["id"]
            got = json.loads(waiter.data.partition(b"\r\n\r\n")[2])["messages"]
            if [message["id"] for message in got] != [last]:
                raise RuntimeError("the poll did not give the one new message: %r" % got)
            times.append((woken, microseconds(sender, alone[turn % VARIANTS], sender, PAUSE)))
        pairs.append([statistics.median(side) for side in zip(*times)])
    run.record_pairs("wake", pairs, "{:.0f} us, alone {:.0f} us")


def fill_channel(run, server, channel, count, deadline=None):
    """Send `count` messages from 64 connections; with a `deadline` (by perf_counter) they all
    expire there, and filling ends in time before it. Returns [(stored, MiB of the server), …]."""
    done, memory, last = 0, [], (deadline or math.inf) - run.sizes.watch / 3 - 2
    while done < count and time.perf_counter() < last:
        ttl = {"ttlSeconds": math.ceil(deadline - time.perf_counter())} if deadline else {}
        part = min(CHUNK, count - done)
        run.load(server.port, channel_lanes(channel, FILL_LANES, **ttl), count=part)
        done += part
        memory.append((done, server.rss()))
        if done % (5 * CHUNK) == 0:
            tell("  {:,} messages stored, {:.1f} MiB".format(*memory[-1]))
    return memory


def read_both(run, server, stored, note):
    """Pages of 10 at start, middle and end of both channels, read by read in turn. A round's value
    is the worst of the three positions, so that one slow place can't hide behind two fast."""
    wire, pairs, reads = Lane(server.port), [], []
    for share in (0, 0.5, 0.98):
        reads.append([])
        for channel, count in (("big", stored), ("small", 1000)):
            path = "/api/messages/inbox/" + channel
            first = wire.call("GET", path + "?limit=1")["messages"][0]["id"]
            path += "?limit=10&afterId=%d" % (first - 1 + int(count * share))
            if len(wire.call("GET", path)["messages"]) != 10:
                raise RuntimeError("%s did not give 10 messages" % path)
            reads[-1].append(bench_request("GET", path))
    for _ in range(run.sizes.rounds):
        medians = [[statistics.median(side) for side in zip(*(
            [microseconds(wire, text, wire) for text in pair] for _ in range(run.sizes.turns)))]
            for pair in reads]
        pairs.append(max(medians, key=lambda pair: pair[0] / pair[1]))
    run.record_pairs("million", pairs, "{:.0f} us, small {:.0f} us" + note)


def watch_purge(run, server, deadline, empty, note):
    """p99 of sends before the deadline, and from it until the purge is over. Sends go on, so then
    the used pages of the database, which sank, rise again: the purge ends at their minimum."""
    lanes, pages, watch = channel_lanes("after", LANES), [], run.sizes.watch
    time.sleep(max(0.0, deadline - watch / 3 - 1 - time.perf_counter()))
    quiet = p99(run.load(server.port, lanes, seconds=watch / 3))
    full = server.used_pages()
    load = run.load(server.port, lanes, deadline + watch - time.perf_counter(),
                    watch=lambda: pages.append((server.used_pages(), time.perf_counter())))
    least, end = min(pages)
    gone = (full - least) / max(1, full - empty)    # sends fill the file again meanwhile
    if gone < 0.5:
        end, note = load.stop, note + ", %d %% gone in %d s" % (100 * gone, watch)
    seconds = itertools.takewhile(lambda second: second < end, itertools.count(deadline))
    slices = [p99(load, second, min(end, second + 1)) / quiet for second in seconds]
    value = p99(load, deadline, end)
    run.record("expiry", [ratio for ratio in slices if ratio > 0], value / quiet,
               "%.1f ms, quiet %.1f ms, over in %.1f s%s" % (
                   value * 1e3, quiet * 1e3, end - deadline, note))
    run.results["expiry"]["ok"] &= gone > 0.02  # what does not happen slows nobody


def stage_million(run):
    """Fill one big channel whose messages expire together; weigh it, read it, watch it go."""
    server, sizes = run.keep(BenchServer(run.folder, "million")), run.sizes
    begin = time.perf_counter()
    base = fill_channel(run, server, "warm", CHUNK)[-1][1]
    filling = min(FILL_SECONDS, 1.3 * sizes.stored / CHUNK * (time.perf_counter() - begin))
    fill_channel(run, server, "small", 1000)
    empty = server.used_pages()
    reading = sizes.rounds * sizes.turns * 6 * 0.001
    deadline = time.perf_counter() + filling + reading + sizes.watch / 3 + 3
    memory = fill_channel(run, server, "big", sizes.stored, deadline)
    stored = memory[-1][0]
    note = "" if stored == sizes.stored else " only {:,} stored in time".format(stored)
    grown = max(rss for done, rss in memory if done + CHUNK <= sizes.growth) - base
    run.record("growth", [grown], note="{:.1f} MiB at 20,000".format(base))
    read_both(run, server, stored, note)
    run.record("stored", [server.rss() - base], note=note)
    if "expiry" in run.names:
        watch_purge(run, server, deadline, empty, note)


def raise_file_limit(wanted):
    """Raise the limit of open files, which servers inherit; whether `wanted` may be open."""
    try:
        import resource  # POSIX only
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
        return True
    except (ImportError, ValueError, OSError):
        return False


def poll_requests(server, count):
    """Long polls that nothing ends: half on channels of their own, half by members of sessions."""
    members = join_agents(server, max(1, count // 100), 50)[:count // 2]
    return [bench_request("GET", "/api/messages/inbox/lonely-%d?wait=60" % number)
            for number in range(count - len(members))] + [
        bench_request("GET", "/v1/sessions/%s/messages?after=0&wait=60" % session, X_Agent_Id=agent)
        for session, agent, _key in members]


def stage_parked(run):
    """Two servers, one with all the polls parked; sends to both by turns; then some are woken."""
    wanted = run.sizes.parked
    if not raise_file_limit(wanted + 500) or not os.path.isdir("/proc/self/fd"):
        for name in ("held", "parked-rss", "parked"):
            run.skip(name, "needs /proc and %d open files (ulimit -n)" % (wanted + 500))
        return
    free, server = (run.keep(BenchServer(run.folder, name)) for name in ("free", "parked"))
    polls, begin = poll_requests(server, wanted), time.perf_counter()
    holders = [run.keep(Worker(hold_polls, server.port, polls[half::2])) for half in (0, 1)]
    for holder in holders:
        holder.result()
    time.sleep(1)
    tell("  parked in %.1f s, %.0f MiB" % (time.perf_counter() - begin, server.rss()))
    run.compare("parked", (free.port, channel_lanes("sends", LANES)),
                (server.port, channel_lanes("sends", LANES)))
    run.record("parked-rss", [server.rss()])
    sockets = len(os.listdir("/proc/%d/fd" % server.process.pid))
    for name in ("lonely-%d" % number for number in range(100)):  # are those that look parked?
        Lane(server.port).call("POST", "/api/messages", {"channel": name, "content": "up"})
    time.sleep(1)
    for holder in holders:
        holder.pipe.send("report")
    held, woken, lost = zip(*(holder.result() for holder in holders))
    for reasons in lost:
        run.bad.update(reasons)
    held, woken = min(sum(held) + sum(woken), sockets), sum(woken)
    run.record("held", [held / wanted * (woken == 100)], note="%d of 100 woken" % woken)


def process_seconds(command, folder, url):
    """Wall seconds of one process that must succeed."""
    begin = time.perf_counter()
    environ = bench_environment(folder, NEXUS_URL=url)
    done = subprocess.run(command, env=environ, cwd=folder, timeout=30,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        output = (done.stdout + done.stderr).decode(errors="replace").strip()
        raise RuntimeError("exit %d from %s: %s" % (done.returncode, command[:4], output[-300:]))
    return time.perf_counter() - begin


def stage_command_line(run):
    """Whole processes, interleaved: bare Python, the two sends, and what the bash client does."""
    server = run.keep(BenchServer(run.folder, "command-line"))
    session, agent, key = join_agents(server, 1, 1)[0]
    config = pathlib.Path(run.folder, ".config", "messaging")
    (config / "sessions" / session).mkdir(parents=True, mode=0o700)
    (config / "aliases.json").write_text("{}\n")
    for name, value in zip(("agent", "key", "cursor", "server"), (agent, key, "0", server.url)):
        (config / "sessions" / session / name).write_text(value + "\n")
    copy = shutil.copy(NEXUS, run.folder)
    launcher = json.loads(subprocess.run(
        [sys.executable, copy, "install", "--bin", os.path.join(run.folder, "bin")], check=True,
        stdout=subprocess.PIPE, env=bench_environment(run.folder)).stdout.decode())["launcher"]
    commands = {"python": [sys.executable, "-c", "pass"],
                "python -S": [sys.executable, "-S", "-c", "pass"],
                "launcher": [launcher, "send", session, prose(1)],
                "cli-send": [sys.executable, NEXUS, "send", session, prose(1)],
                "cli-tx": [sys.executable, NEXUS, "tx", "send", "builds", prose(1)],
                "bash": ["bash", "-c", BASH_SEND, "send", session, prose(1)]}
    missing = [tool for tool in ("bash", "curl", "jq") if not shutil.which(tool)]
    if missing:
        del commands["bash"]
    times = {name: [] for name in commands}
    for name in list(commands) * (STARTS + 1):
        times[name].append(process_seconds(commands[name], run.folder, server.url) * 1e3)
    bare = statistics.median(times["python"])
    for name in ("cli-send", "cli-tx", "launcher"):
        if name == "launcher":
            bare = statistics.median(times["python -S"])
        own = [each - bare for each in times[name][1:]]  # the first one warmed the disk's cache
        if missing:
            run.skip(name, "no %s; ours takes %.1f ms" % (missing[0], statistics.median(own)))
        else:
            bash = statistics.median(times["bash"][1:])
            run.record(name, [each / bash for each in own], note="%.1f ms, bash %.1f ms" % (
                statistics.median(own), bash))


def stage_idle(run):
    """A server that has answered once and waits."""
    server = run.keep(BenchServer(run.folder, "idle"))
    Lane(server.port).call("GET", "/health")
    time.sleep(1)
    run.record("idle", [server.rss()])


STAGES = [
    (stage_idle, ("idle",)),
    (stage_throughput, ("send", "session", "inbox")),
    (stage_wake, ("wake",)),
    (stage_follow, ("follow",)),
    (stage_batch, ("batch",)),
    (stage_kept, ("kept",)),
    (stage_postgres, ("postgres", "postgres-2")),
    (stage_command_line, ("cli-send", "cli-tx", "launcher")),
    (stage_million, ("million", "growth", "stored", "expiry")),
    (stage_parked, ("held", "parked-rss", "parked")),
]


# ---- the report


def bench_machine(folder):
    """What the numbers depend on: cores, versions, file system and what one fsync costs there."""
    points, times = [("", "unknown")], []
    with contextlib.suppress(OSError), open("/proc/mounts", encoding="utf-8") as mounts:
        points += [line.split()[1:3] for line in mounts]
    inside = [point for point in points if (folder + "/").startswith(point[0].rstrip("/") + "/")]
    with open(os.path.join(folder, "probe"), "wb", buffering=0) as probe:
        for _ in range(30):
            probe.write(b"x" * 4096)
            begin = time.perf_counter()
            os.fsync(probe.fileno())
            times.append(time.perf_counter() - begin)
    return {"cores": os.cpu_count(), "system": platform.platform(terse=True),
            "python": "%s %s" % (platform.python_implementation(), platform.python_version()),
            "sqlite": sqlite3.sqlite_version, "filesystem": max(inside, key=lambda p: len(p[0]))[1],
            "fsyncMicroseconds": round(statistics.median(times) * 1e6)}


def bench_table(facts, rows, quick):
    """The result as text: the machine, then one line per row."""
    lines = ["{cores} cores, {python}, SQLite {sqlite}, {filesystem} (fsync {fsyncMicroseconds} us)"
             ", {system}".format(**facts)]
    if quick:
        lines.append("--quick: smaller sizes, fewer rounds; the targets are meant for a full run")
    shape = "%-11s%-48s%-22s%-21s%-8s%s"
    lines += ["", shape % ("row", "work", "target", "median (min-max)", "", "medians behind it")]
    for row in rows:
        measured = "%.2f (%.2f-%.2f)" % (row["measured"], row["min"], row["max"]) \
            if "measured" in row else ""
        verdict = {True: "ok", False: "MISSED", None: ""}[row["ok"]]
        lines.append(shape % (row["name"], row["work"], row["target"], measured, verdict,
                              row["note"].strip()))
    return "\n".join(line.rstrip() for line in lines)


def bench_arguments(argv):
    """The parsed command line of `bench`."""
    parser = argparse.ArgumentParser(prog="test_nexus.py bench", description=(
        "Measure nexus.py against the stock http.server; TMPDIR picks the disk."))
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, about a minute")
    parser.add_argument("--only", action="append", metavar="ROW", choices=[r.name for r in ROWS],
                        help="this row and those of its family (parked-rss is one of parked): one"
                        " of %(choices)s; may be repeated")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (5, quick 3)")
    return parser.parse_args(argv)


def bench(argv):
    """Run the benchmark and print its table; 0 if it ran, whatever it measured."""
    options, begin = bench_arguments(argv), time.monotonic()
    sizes = QUICK if options.quick else FULL
    sizes = sizes._replace(rounds=max(1, options.rounds or sizes.rounds))
    names = [row.name for row in ROWS if not options.only
             or {row.name, row.name.partition("-")[0]} & set(options.only)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `kill` cleans up as well
    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder:
        folder = os.path.realpath(folder)
        facts, run = bench_machine(folder), BenchRun(sizes, names, folder)
        try:
            for stage, stage_rows in STAGES:
                if set(stage_rows).intersection(names):
                    run.stage(stage, stage_rows)
        except KeyboardInterrupt:
            tell("interrupted; what is measured so far:")
    tell("done in %.0f s; busiest load generator: %.0f%% of a core%s" % (
        time.monotonic() - begin, run.busy * 100,
        ", so it is part of what was measured" if run.busy > 0.9 else ""))
    rows = [dict({"name": row.name, "work": row.work.format(**sizes._asdict()),
                  "target": "%s %g %s" % (row.sign, row.limit, row.unit)}, **run.results[row.name])
            for row in ROWS if row.name in names and row.name in run.results]
    if options.json:
        print(json.dumps({"machine": facts, "quick": options.quick, "rows": rows}, indent=2))
    else:
        print(bench_table(facts, rows, options.quick))
    return 0


def run_half(number):
    """Run every other class of tests; returns an exit code."""
    suite = unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"])
    half = unittest.TestSuite(list(suite)[int(number)::2])
    return not unittest.TextTestRunner().run(half).wasSuccessful()


def run_halves():
    """Run the tests in two processes, on two cores half the time; the second reports at the end."""
    with tempfile.TemporaryFile() as later:
        runs = [subprocess.Popen([sys.executable, os.path.abspath(__file__), "half", number],
                                 stderr=errors) for number, errors in (("0", None), ("1", later))]
        codes = [run.wait() for run in runs]
        later.seek(0)
        sys.stderr.write(later.read().decode("utf-8", "replace"))
    return int(any(codes))


if __name__ == "__main__":
    if sys.argv[1:2] == ["half"]:
        sys.exit(run_half(sys.argv[2]))
    if len(sys.argv) == 1 and (os.cpu_count() or 1) > 1:
        sys.exit(run_halves())
    if sys.argv[1:2] == ["bench"]:
        sys.exit(bench(sys.argv[2:]))
    if sys.argv[1:2] == ["fuzz"]:
        sys.exit(fuzz(sys.argv[2:]))
    unittest.main()
