// SPDX-License-Identifier: MIT OR Apache-2.0
//! What page states and waiting cost with 1 to 64 threads, without KVM and without userfaultfd:
//! where threads would meet, if they met.
//!
//!     cargo bench --features internals --bench scaling [-- --json FILE]
//!
//! `distinct`: each thread brings pages of its own, as vCPUs do that touch different memory.
//! `shared`: all threads want the same pages in the same order; one brings each, and the others
//! wait for it. What is told is what one thread spends on one page: CPU time, so that more threads
//! than CPUs don't count as slow. It should not grow with the number of threads.

use kvmfault::internals::{Hva, Pages, Sleeper, State, WAITS};
use std::fmt::Write;
use std::sync::Barrier;
use std::time::{Duration, Instant};

const ROUNDS: usize = 7;
const HVA: Hva = Hva(0x7f00_0000_0000);

/// Brings pages that are this thread's alone.
fn distinct(pages: &Pages, thread: u64, threads: u64) -> u64 {
    let share = pages.len() / threads;
    for page in thread * share..(thread + 1) * share {
        assert!(pages.change(page, State::Absent, State::Resolving).is_ok());
        pages.make_present(page);
        WAITS.wake(HVA + page * 4096);
    }
    share
}

/// Wants all pages; brings those at which it is first.
fn shared(pages: &Pages, _thread: u64, _threads: u64) -> u64 {
    let sleeper = Sleeper::default();
    for page in 0..pages.len() {
        let hva = HVA + page * 4096;
        match pages.change(page, State::Absent, State::Resolving) {
            Ok(()) => {
                pages.make_present(page);
                WAITS.wake(hva);
            }
            Err(_) => {
                while pages.get(page) != State::Present {
                    WAITS.wait(hva, &sleeper, Duration::from_millis(20), || pages.get(page) == State::Resolving);
                }
            }
        }
    }
    pages.len()
}

/// Nanoseconds that a thread spends on a page: of CPU time; and of the clock, with all threads
/// going on at once.
fn run(work: fn(&Pages, u64, u64) -> u64, threads: u64, pages: u64) -> (f64, f64) {
    let states = Pages::new(pages).expect("memory for page states");
    // Touched beforehand: the first access to a page of the states is a page fault of its own.
    states.fill(State::Absent);
    let barrier = Barrier::new(threads as usize + 1);
    let (mut brought, begin, cpu) = (0, Instant::now(), cpu_time());
    std::thread::scope(|scope| {
        let (states, barrier) = (&states, &barrier);
        let workers: Vec<_> = (0..threads)
            .map(|n| {
                scope.spawn(move || {
                    barrier.wait();
                    work(states, n, threads)
                })
            })
            .collect();
        barrier.wait();
        brought = workers.into_iter().map(|w| w.join().expect("a worker")).sum();
    });
    let elapsed = begin.elapsed();
    ((cpu_time() - cpu).as_nanos() as f64 / brought as f64, elapsed.as_nanos() as f64 / brought as f64)
}

/// CPU time of this process.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes to a live timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let json = match &arguments[..] {
        [] => None,
        [option, file] if option == "--json" => Some(file),
        _ => {
            eprintln!("usage: cargo bench --features internals --bench scaling [-- --json FILE]");
            std::process::exit(2);
        }
    };
    let mut list = String::new();
    println!(
        "{:9} {:>7} {:>14} {:>14}  (median of {ROUNDS}; lowest .. highest)",
        "pages", "threads", "cpu ns a page", "ns a page"
    );
    for (name, work) in [("distinct", distinct as fn(&Pages, u64, u64) -> u64), ("shared", shared)] {
        for threads in [1, 2, 4, 8, 16, 32, 64] {
            let pages = if name == "distinct" { 8 << 20 } else { (8 << 20) / threads };
            let mut rounds: Vec<(f64, f64)> = (0..ROUNDS).map(|_| run(work, threads, pages)).collect();
            rounds.sort_by(|a, b| a.0.total_cmp(&b.0));
            let (cpu, low, high) = (rounds[ROUNDS / 2].0, rounds[0].0, rounds[ROUNDS - 1].0);
            rounds.sort_by(|a, b| a.1.total_cmp(&b.1));
            let wall = rounds[ROUNDS / 2].1;
            println!("{name:9} {threads:>7} {cpu:>14.1} {wall:>14.1}  {low:.1} .. {high:.1}");
            let comma = if list.is_empty() { "" } else { ",\n" };
            let _ = write!(
                list,
                "{comma} {{\"pages\": \"{name}\", \"threads\": {threads}, \"cpu_ns_per_page\": {cpu:.1}, \"ns_per_page\": {wall:.1}}}"
            );
        }
    }
    if let Some(file) = json {
        std::fs::write(file, format!("[\n{list}\n]\n")).unwrap_or_else(|e| {
            eprintln!("scaling: {file}: {e}");
            std::process::exit(2);
        });
    }
}
