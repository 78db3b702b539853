# SPDX-License-Identifier: MIT OR Apache-2.0
"""What can be tested of kvmfault_qemu without a QEMU: see check."""

import pathlib
import re
import socket
import tempfile
import unittest

from kvmfault_qemu import process, proxy, report, serial


def row(mechanism, p50, result="PASS", case="postcopy"):
    return report.row(kernel="k", case=case, mechanism=mechanism, fault_p50_us=p50, fault_p99_us=p50 and 3 * p50, seconds=2.0, result=result)


class Report(unittest.TestCase):
    def test_rounds_become_one_row(self):
        merged = report.merged([row("qemu", 3.0), row("qemu", 1.0), row("qemu", 9.0)])
        self.assertEqual((merged["fault_p50_us"], merged["range"]["fault_p50_us"], merged["rounds"]), (3.0, [1.0, 9.0], 3))
        self.assertEqual((merged["seconds"], merged["downtime_ms"]), (6.0, None))
        self.assertEqual(report.merged([row("qemu", 1.0), row("qemu", 2.0)])["fault_p50_us"], 1.5)

    def test_the_worst_round_counts(self):
        rounds = [row("qemu", 3.0), row("qemu", None, "SKIP"), row("qemu", None, "FAIL"), row("qemu", 1.0)]
        self.assertEqual(report.merged(rounds)["result"], "FAIL")
        self.assertEqual(report.merged(rounds[:2])["result"], "SKIP")

    def test_ratios_are_of_the_same_case(self):
        rows = [report.merged([r]) for r in (row("qemu", 10.0), row("auto", 9.0), row("poison-trap", 5.0, case="recover"), row("private", None))]
        lines = list(report.ratios(rows))
        self.assertEqual(lines, ["# k, postcopy: auto / qemu: p50 0.90, p99 0.90 (1 rounds)"])
        self.assertTrue(report.is_ratio(lines[0]) and not report.is_ratio("# PASS qemu/postcopy[qemu] 20.5"))


class Serial(unittest.TestCase):
    def test_histogram(self):
        # guest.c: bucket 24 begins at 8 ticks, 32 at 16, eight an octave.
        matched = serial.HISTOGRAM.match("histogram 3:7 24:2 33:1 end")
        found = serial.buckets(matched)
        self.assertEqual(found, [(3, 7), (8, 2), (18, 1)])
        self.assertEqual(serial.slowest(found, 2), [(8, 1), (18, 1)])
        self.assertAlmostEqual(serial.percentile(found, 0.5), 3 * 1.0625)
        self.assertAlmostEqual(serial.percentile(found, 0.99), 18 * 1.0625)

    def test_passes(self):
        self.assertEqual(serial.PASS.match("pass 12 ok cpus 12 13 tsc 99").groups(), ("12 13", "99"))
        self.assertIsNone(serial.PASS.match("WRONG 0 1 2"))


class Process(unittest.TestCase):
    def test_what_the_patched_qemu_prints(self):
        end = process.FAULTS.search("4711@1.5:kvm_faults_end mechanism=poison-trap vcpu_faults=827 waited=826 slots=6")
        self.assertEqual(end.groups(), ("poison-trap", "827", "6"))
        self.assertEqual(process.ARMED.search("kvm_faults_listen slots=6 missing=30000 us=44663")[1], "44663")
        # The two ends of the same string.
        patches = "".join(p.read_text() for p in sorted((pathlib.Path(__file__).resolve().parent / "patches").glob("*.patch")))
        self.assertTrue(re.search(r'^\+kvm_faults_end\(.*"mechanism=%s vcpu_faults=.*slots=%u"$', patches, re.M))
        self.assertTrue(re.search(r'^\+kvm_faults_listen\(.*us=%"', patches, re.M))


class Network(unittest.TestCase):
    def test_it_passes_on_until_it_is_killed(self):
        with tempfile.TemporaryDirectory() as here, socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as near:
            listener.bind(f"{here}/target")
            listener.listen()
            network = proxy.Proxy(f"{here}/proxy", f"{here}/target")
            self.addCleanup(network.kill)
            near.connect(f"{here}/proxy")
            far = listener.accept()[0]
            self.addCleanup(far.close)
            near.settimeout(10)
            far.settimeout(10)
            for sender, receiver in ((near, far), (far, near)):
                sender.sendall(b"page" * 1000)
                self.assertEqual(receiver.recv(4000, socket.MSG_WAITALL), b"page" * 1000)
            far.shutdown(socket.SHUT_WR)
            self.assertEqual(near.recv(1), b"")
            near.sendall(b"still")
            self.assertEqual(far.recv(5, socket.MSG_WAITALL), b"still")
            network.kill()
            self.assertEqual(far.recv(1), b"")


if __name__ == "__main__":
    unittest.main()
