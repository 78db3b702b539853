# SPDX-License-Identifier: MIT OR Apache-2.0
"""Debian packages without touching /etc/apt: the same mirrors and keys, our own list of suites."""

import functools
import os
import re
import subprocess

from .cache import CACHE, Unavailable, locked

# bookworm has 6.1 and 6.12 whatever Debian runs here; the backports of its successor have the
# newest kernel.
SUITES = ["bookworm", "bookworm-updates", "trixie-backports"]
SECURITY_SUITES = ["bookworm-security"]
RELEASES = ["bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing", "unstable"]
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def run(*command, **options):
    try:
        return subprocess.run(command, check=True, text=True, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options).stdout
    except FileNotFoundError:
        raise Unavailable(f"{command[0]} not found: kernels are taken from Debian packages")
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip() or error.stdout.strip() or "no message").splitlines()[-1]
        raise Unavailable(f"{' '.join(command)} failed: {last}")


def mirrors():
    """(Debian's mirror, its security mirror or None), as configured on this machine.

    The machine need not have fetched its package lists.
    """
    uris = run("apt-get", "--print-uris", "update")
    found = re.findall(r"^'(\S+/)dists/(\S+?)/InRelease'", uris, re.M)
    security = [uri for uri, suite in found if re.search(r"-security$|/updates$", suite)]
    # Others have suites called `stable`, too: Debian's own is the one with a path of its name, if
    # there is one.
    main = sorted((uri for uri, suite in found if suite in RELEASES), key=lambda uri: "/debian/" not in uri)
    if not main:
        raise Unavailable("no Debian mirror in this machine's apt configuration (/etc/apt/sources.list.d); "
                          "add one, e.g. deb https://deb.debian.org/debian bookworm main")
    return main[0], security[0] if security else None


class Apt:
    """apt-get and apt-cache over our suites.

    State and lists live in the cache, under a name for each choice of suites.
    """

    fresh = set()

    def __init__(self, name="apt", types="deb", suites=SUITES, security_suites=SECURITY_SUITES):
        self.name, self.types, self.suites, self.security_suites = name, types, suites, security_suites
        self.home = CACHE / name
        self.conf = self.home / "apt.conf"

    def configure(self):
        for directory in ("lists/partial", "cache/archives/partial"):
            (self.home / directory).mkdir(parents=True, exist_ok=True)
        (self.home / "status").touch()
        main, security = mirrors()
        signed = f"Signed-By: {KEYRING}\n" if os.path.exists(KEYRING) else ""
        sources = f"Types: {self.types}\nURIs: {main}\nSuites: {' '.join(self.suites)}\nComponents: main\n{signed}\n"
        if security:
            sources += f"Types: {self.types}\nURIs: {security}\nSuites: {' '.join(self.security_suites)}\nComponents: main\n{signed}"
        (self.home / "debian.sources").write_text(sources)
        # Read last (-c), so that it also clears the hooks of the machine's own configuration.
        self.conf.write_text(f'''
Dir::Etc::sourcelist "{self.home}/debian.sources";
Dir::Etc::sourceparts "-";
Dir::State "{self.home}";
Dir::State::lists "{self.home}/lists";
Dir::State::status "{self.home}/status";
Dir::Cache "{self.home}/cache";
APT::Architecture "amd64";
APT::Architectures {{ "amd64"; }};
APT::Sandbox::User "";
APT::Get::List-Cleanup "true";
Acquire::Languages "none";
Acquire::Retries "3";
# clear APT::Update::Post-Invoke;
# clear APT::Update::Post-Invoke-Success;
# clear Acquire::IndexTargets::deb::DEP-11;
''')

    def update(self):
        """Fetches the lists, once a process."""
        if self.name not in Apt.fresh:
            with locked(self.name):
                self.configure()
                try:
                    # Without the option, apt-get calls it a success when no list could be fetched.
                    run("apt-get", "-c", str(self.conf), "-q", "-o", "APT::Update::Error-Mode=any", "update")
                except Unavailable as error:
                    raise Unavailable(f"Debian's mirror {mirrors()[0]} cannot be used; when `apt-get update` works, "
                                      f"this works, too ({error})")
            Apt.fresh.add(self.name)

    def candidates(self, package):
        """Every version of a package: its control fields, newest version first."""
        self.update()
        try:
            shown = run("apt-cache", "-c", str(self.conf), "show", package)
        except Unavailable:
            return []
        found = []
        for paragraph in shown.split("\n\n"):
            fields = dict(re.findall(r"^([A-Za-z-]+): (.*)$", paragraph, re.M))
            if fields.get("Package") == package and fields not in found:
                found.append(fields)
        return sorted(found, key=functools.cmp_to_key(newer_first))

    def unpack(self, package, version, directory):
        """Downloads (apt checks the signature) and unpacks one package."""
        self.update()
        downloads = directory / "download"
        downloads.mkdir(parents=True, exist_ok=True)
        run("apt-get", "-c", str(self.conf), "-q", "download", f"{package}={version}", cwd=downloads)
        for deb in downloads.glob("*.deb"):
            run("dpkg", "-x", str(deb), str(directory))
            deb.unlink()
        downloads.rmdir()

    def download_source(self, package, directory):
        """Downloads the newest source package, without unpacking it; needs types="deb-src".

        apt checks its signature and hashes.
        """
        self.update()
        run("apt-get", "-c", str(self.conf), "-q", "source", "--download-only", "--only-source", package, cwd=directory)


def newer_first(a, b):
    if a["Version"] == b["Version"]:
        return 0
    newer = subprocess.run(["dpkg", "--compare-versions", a["Version"], "gt", b["Version"]]).returncode == 0
    return -1 if newer else 1
