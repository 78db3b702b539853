# SPDX-License-Identifier: MIT OR Apache-2.0
"""What can be tested of kvmfault_vm without booting: python3 -m unittest discover -s c-tests/vm"""

import contextlib
import pathlib
import subprocess
import tempfile
import unittest
import unittest.mock

from kvmfault_vm import cases, cpio, guestlog, initrd, machine, tier

HEALTHY = """\
[    0.000000] Linux version 6.12.117+deb12-cloud-amd64
[    0.410000] Speculative Return Stack Overflow: WARNING: See https://kernel.org/doc/html/latest/admin-guide/hw-vuln/srso.html for mitigation options.
[    2.100000] kvm: module verification failed: signature and/or required key missing - tainting kernel
[    2.210000] kvmfault-vm: running
[    3.000000] MCE: Killing case:123 due to hardware memory corruption fault at 7f0000000000
[    3.769376] kvmfault-vm: exit 7
[    3.781624] reboot: Power down
"""


class GuestLog(unittest.TestCase):
    def test_healthy(self):
        self.assertIsNone(guestlog.trouble(HEALTHY))
        self.assertEqual(guestlog.said(HEALTHY, "exit"), "7")
        self.assertEqual(guestlog.said(HEALTHY, "running"), "")
        self.assertIsNone(guestlog.said(HEALTHY, "failed"))

    def test_each_trouble(self):
        for line, kind in [
            ("Kernel panic - not syncing: sysrq triggered crash", "panicked"),
            ("BUG: kernel NULL pointer dereference, address: 0000000000000010", "oopsed"),
            ("Oops: int3: 0000 [#1] PREEMPT SMP NOPTI", "oopsed"),
            ("Oops: general protection fault, probably for non-canonical address", "oopsed"),
            ("WARNING: CPU: 1 PID: 156 at arch/x86/kvm/x86.c:12399 kvm_arch_commit_memory_region+0x80/0x2a0 [kvm]", "warned"),
            ("WARNING: arch/x86/kvm/x86.c:12399 at kvm_arch_commit_memory_region+0x80/0x2a0 [kvm], CPU#1: case/156", "warned"),
            ("------------[ cut here ]------------", "warned"),
            ("watchdog: BUG: soft lockup - CPU#0 stuck for 66s! [case:156]", "locked up"),
            ("INFO: task case:156 blocked for more than 120 seconds.", "locked up"),
            ("rcu: INFO: rcu_preempt self-detected stall on CPU", "stalled"),
            ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", "stalled"),
            ("Out of memory: Killed process 156 (case) total-vm:10kB", "ran out of memory"),
            ("BUG: Bad page state in process case  pfn:12345", "oopsed"),
        ]:
            # Cut off right after: a guest may die while it speaks.
            found = guestlog.trouble(HEALTHY + f"[    4.0] {line}")
            self.assertIsNotNone(found, line)
            self.assertEqual(found, (kind, line))

    def test_cut_here_names_what_follows(self):
        text = "[ 1.0] ------------[ cut here ]------------\n[ 1.0] WARNING: CPU: 0 PID: 1 at kernel/x.c:1 f+0x0/0x1\n"
        self.assertEqual(guestlog.trouble(text), ("warned", "WARNING: CPU: 0 PID: 1 at kernel/x.c:1 f+0x0/0x1"))


class Cases(unittest.TestCase):
    def read(self, text, step=7):
        reader = cases.Reader()
        for i in range(0, len(text), step):
            reader.feed(text[i:i + step].encode())
        reader.close()
        return reader

    def test_lines(self):
        reader = self.read("noise\nPASS basics/link 0.001\r\nFAIL race/64-vcpus[poison-trap] 1.5 page 3: wrong byte\n"
                           "SKIP slots/hugetlb[userfaultfd] 0.0 no huge pages\n1 passed, 1 failed, 1 skipped")
        self.assertEqual([(c.result, c.group, c.name, c.mechanism, c.reason) for c in reader.cases], [
            ("PASS", "basics", "link", None, ""),
            ("FAIL", "race", "64-vcpus", "poison-trap", "page 3: wrong byte"),
            ("SKIP", "slots", "hugetlb", "userfaultfd", "no huge pages"),
        ])
        self.assertIsNone(reader.contradiction())

    def test_what_cannot_be_believed(self):
        for text in ("", "PASS a/b 0.1\n", "PASS a/b 0.1\n2 passed, 0 failed, 0 skipped\n", "0 passed, 0 failed, 0 skipped\n",
                     "PASS a/b 0.1\nPASS a/c 0.1\n1 passed, 1 failed, 0 skipped\n"):
            self.assertIsNotNone(self.read(text).contradiction(), text)

    def test_rows(self):
        reader = self.read("PASS a/x[m] 0.1\nFAIL a/y[m] 0.1 why\nPASS a/x 0.1\n2 passed, 1 failed, 0 skipped\n")
        rows = tier.rows("stock-6.12", "v7", reader, "the guest kernel warned: W")
        self.assertEqual([tuple(r.values()) for r in rows], [
            ("stock-6.12", "v7", "m", "a", 1, 1, 0, "y: why"),
            ("stock-6.12", "v7", None, "a", 1, 0, 0, None),
            ("stock-6.12", "v7", None, "machine", 0, 1, 0, "the guest kernel warned: W"),
        ])


class Fault(unittest.TestCase):
    def test_whose_fault(self):
        kernel, ours = "the guest kernel oopsed: int3", "kernel_selftest.c:99: the memory is wrong"
        theirs = f"kernel_selftest.c:77: {tier.SELFTEST_FAILED}: SHUTDOWN"
        for thread, problem, failed, fault in (
                ("multi", None, [], None), ("multi", None, [ours], None), ("multi", "no end after 3 s", [theirs], None),
                ("multi", kernel, [ours], kernel), ("multi", None, [theirs], theirs), ("multi", None, [theirs, ours], None),
                ("single", kernel, [], None), ("single", None, [theirs], None)):
            with unittest.mock.patch.dict("os.environ", KVMFAULT_VM_TCG_THREAD=thread):
                self.assertEqual(tier.not_the_librarys(problem, failed), fault)

    def test_as_the_case_says_it(self):
        program = pathlib.Path(__file__).parents[1] / "whole/kernel_selftest.c"
        self.assertIn(f'"{tier.SELFTEST_FAILED}: ', program.read_text())


class Matrix(unittest.TestCase):
    def test_default_is_everything(self):
        pairs = tier.matrix({})
        self.assertEqual(pairs[:2], [("stock-6.1", None), ("stock-6.12", None)])
        self.assertEqual(len(pairs), 10)
        self.assertIn(("stock-6.12", "falsefriend"), pairs)

    def test_choice(self):
        self.assertEqual(tier.matrix({"KERNEL": "newest"}), [("newest", None)])
        self.assertEqual(tier.matrix({"KERNEL": "stock-6.12"}), [("stock-6.12", None)])
        self.assertEqual(tier.matrix({"ABI": "v2,v7"}), [("stock-6.12", "v2"), ("stock-6.12", "v7")])
        self.assertEqual(tier.matrix({"ABI": "stock v7"}), [("stock-6.12", None), ("stock-6.12", "v7")])
        with self.assertRaises(ValueError):
            tier.matrix({"ABI": "v5"})


class Logs(unittest.TestCase):
    def test_another_machine_may_have_cleared_it_away(self):
        self.assertEqual(machine.written_at(pathlib.Path("/no/such/log")), 0)


class Waiting(unittest.TestCase):
    """A slow machine is waited for, a silent one isn't."""

    def pump(self, script, timeout, silence):
        said = []
        with tempfile.TemporaryDirectory() as here, subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, cwd=here) as fake:
            try:
                log = pathlib.Path(here, "log")
                return machine.pump(fake, said.append, timeout, silence, log), b"".join(said)
            finally:
                fake.kill()

    def test_words_or_kernel_messages_are_a_sign_of_life(self):
        self.assertEqual(self.pump("for n in 1 2 3 4; do echo $n; sleep 1; done", 60, 3), (None, b"1\n2\n3\n4\n"))
        self.assertEqual(self.pump("for n in 1 2 3 4; do echo $n >>log; sleep 1; done", 60, 3), (None, b""))

    def test_silence_and_lateness_end_it(self):
        self.assertEqual(self.pump("echo begun; exec sleep 60", 60, 2), ("no word for 2 s", b"begun\n"))
        self.assertEqual(self.pump("while echo word; do sleep 1; done", 3, 60)[0], "no end after 3 s")


class Initrd(unittest.TestCase):
    def test_archive_is_what_cpio_reads(self):
        archive = cpio.Archive()
        archive.file("a/b/c", b"xyz", 0o755)
        archive.link("a/l", "b/c")
        with tempfile.TemporaryDirectory() as work:
            path = pathlib.Path(work) / "x"
            archive.write(path)
            data = path.read_bytes()
            self.assertEqual(len(data) % 4, 0)
            self.assertEqual(data.count(b"070701"), 5)  # a, a/b, the file, the link, the trailer
            with contextlib.suppress(FileNotFoundError):  # busybox is there wherever vm-run works
                names = subprocess.run(["/bin/busybox", "cpio", "-t"], input=data, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL).stdout.decode().split()
                self.assertEqual(names, ["a", "a/b", "a/b/c", "a/l"])

    def test_quoting(self):
        words = ["a b", "it's", "$HOME", "", "*"]
        line = " ".join(map(initrd.quoted, words))
        shown = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], stdout=subprocess.PIPE, text=True).stdout
        self.assertEqual(shown.split("\n")[:-1], words)


if __name__ == "__main__":
    unittest.main()
