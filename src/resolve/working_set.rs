//! The working set of a guest: which pages it needed, and in which order; recorded in one run, and
//! fetched first in the next.
//!
//! The file, all numbers little-endian:
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | `KVMFWSET` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | CRC-32 (IEEE) of all that follows |
//! | 16 | 8 | bytes of guest memory: the sum of its slots |
//! | 24 | 8 | where guest memory ends |
//! | 32 | 8 | number of records |
//! | 40 | | the records |
//!
//! A record has the pages of one fault, as three unsigned LEB128 numbers: the distance of its first
//! page from the end of the record before (in pages of 4 KiB, zigzag), its number of pages, and
//! microseconds since the record before.

use crate::error::{fail, Error, Result};
use crate::kernel::address::{Gpa, Hva};
use crate::kernel::mem::Mapping;
use crate::memory::block::Block;
use crate::memory::slots::Slots;
use crate::stats::{shard, SHARDS};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::time::Instant;

const MAGIC: &[u8; 8] = b"KVMFWSET";
const VERSION: u32 = 1;
const HEADER: usize = 40;
/// The unit of the file's records, whatever the size of the host's pages is.
const UNIT: u64 = 4096;

/// How many faults one log holds. Its memory is taken as faults come (16 bytes each).
const MOST: u64 = 1 << 20;
/// The most pages of a record: what fits beside an address.
const MOST_PAGES: u64 = UNIT;
/// How many records, in the order of time, are fetched in the order of addresses, neighbours
/// together.
const TOGETHER: usize = 1024;

/// Records faults. Threads have logs of their own, so that vCPUs do not meet.
#[derive(Debug)]
pub struct Recorder {
    begin: Instant,
    logs: Box<[Log]>,
}

#[derive(Debug)]
struct Log {
    /// Two words for each fault: the address, with the number of pages less one; and nanoseconds
    /// since the beginning, plus one.
    words: Mapping,
    len: AtomicU64,
}

impl Recorder {
    /// A recorder without faults.
    pub fn new() -> Result<Recorder> {
        let log = |_| Ok(Log { words: Mapping::anonymous(MOST * 16)?, len: AtomicU64::new(0) });
        Ok(Recorder { begin: Instant::now(), logs: (0..SHARDS).map(log).collect::<Result<_>>()? })
    }

    /// Notes pages that were needed, or predicted, and have been fetched.
    pub fn note(&self, block: &Block, pages: &Range<u64>) {
        let log = &self.logs[shard()];
        let time = self.begin.elapsed().as_nanos() as u64 + 1;
        let (mut hva, end) = (block.hva_of(pages.start), block.hva_of(pages.end));
        while hva < end {
            let count = ((end - hva) / UNIT).min(MOST_PAGES);
            let at = log.len.fetch_add(1, Relaxed);
            if at >= MOST {
                return;
            }
            let words = &log.words.atomics()[at as usize * 2..];
            words[0].store(hva.0 | (count - 1), Relaxed);
            words[1].store(time, Release);
            hva += count * UNIT;
        }
    }

    /// What was recorded, in the order of time, by guest address, without memory that is in no slot
    /// any more.
    pub fn records(&self, slots: &Slots) -> Result<Vec<Record>> {
        // A log may grow meanwhile, and its length may exceed its room.
        let lens: Vec<_> = self.logs.iter().map(|log| log.len.load(Relaxed).min(MOST) as usize).collect();
        let mut found: Vec<(u64, u64)> = room_for(lens.iter().sum(), "faults")?;
        for (log, len) in self.logs.iter().zip(lens) {
            let words = log.words.atomics().chunks_exact(2).take(len);
            found.extend(words.map(|w| (w[1].load(Acquire), w[0].load(Relaxed))).filter(|(time, _)| *time > 0));
        }
        found.sort_unstable();
        let record = |(time, word): (u64, u64)| {
            let (hva, count) = (Hva(word / UNIT * UNIT), word % UNIT + 1);
            let (block, page) = slots.at_hva(hva)?;
            let slot = slots.showing(block, page)?;
            Some(Record { gpa: slot.gpa_of(page), pages: count, us: (time - 1) / 1000 })
        };
        // Pages that were dropped and needed again may make more records than there are pages: the
        // first ones count.
        let most = found.len().min(most_records(Shape::of(slots)) as usize);
        let mut records = room_for(most, "records")?;
        records.extend(found.into_iter().filter_map(record).take(most));
        Ok(records)
    }
}

/// The most records that a working set of such memory has: one for each page.
pub fn most_records(shape: Shape) -> u64 {
    shape.bytes / UNIT
}

/// The most bytes that the file of such memory has: a number takes at most ten.
pub fn longest_file(shape: Shape) -> u64 {
    HEADER as u64 + most_records(shape).saturating_mul(30)
}

/// The pages of one fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// The guest physical address of the first page.
    pub gpa: Gpa,
    /// The number of pages of 4 KiB.
    pub pages: u64,
    /// Microseconds since recording began.
    pub us: u64,
}

/// What must be equal in the VM that was recorded and in the VM that uses the working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The bytes of guest memory.
    pub bytes: u64,
    /// Where guest memory ends.
    pub end: Gpa,
}

impl Shape {
    /// The shape of the memory in these slots.
    pub fn of(slots: &Slots) -> Shape {
        let bytes = slots.iter().map(|s| s.region.len).sum();
        Shape { bytes, end: slots.iter().map(|s| s.region.gpa + s.region.len).max().unwrap_or_default() }
    }
}

/// A vector with room for `count` items; ENOMEM if there is no memory for it, as a failing
/// allocation would abort the process.
fn room_for<T>(count: usize, what: &str) -> Result<Vec<T>> {
    let mut list = Vec::new();
    let room = list.try_reserve_exact(count);
    room.map_err(|_| Error::new(libc::ENOMEM, format!("needs memory for {count} {what}, which isn't there")))?;
    Ok(list)
}

/// Writes the bytes of the file.
pub fn encode(shape: Shape, records: &[Record]) -> Result<Vec<u8>> {
    // Three numbers of at most ten bytes each; memory that is not touched costs nothing.
    let mut body = room_for(32 + 30 * records.len(), "bytes")?;
    for word in [shape.bytes, shape.end.0, records.len() as u64] {
        body.extend(word.to_le_bytes());
    }
    let (mut expected, mut time) = (0, 0);
    for record in records {
        let page = record.gpa.0 / UNIT;
        let distance = page.wrapping_sub(expected) as i64;
        put(&mut body, (distance << 1 ^ distance >> 63) as u64);
        put(&mut body, record.pages);
        put(&mut body, record.us.saturating_sub(time));
        (expected, time) = (page.wrapping_add(record.pages), record.us.max(time));
    }
    let mut file: Vec<u8> = room_for(16 + body.len(), "bytes")?;
    file.extend(MAGIC);
    file.extend(VERSION.to_le_bytes());
    file.extend(crc32fast::hash(&body).to_le_bytes());
    file.extend(body);
    Ok(file)
}

/// Reads the records of a file, for a VM of this shape. An error with EINVAL says what is wrong
/// with the file.
pub fn decode(file: &[u8], shape: Shape) -> Result<Vec<Record>> {
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| file[at + n]));
    if file.len() < HEADER || &file[..8] != MAGIC {
        fail!(EINVAL, "is not a working set");
    }
    match word(8) as u32 {
        VERSION => {}
        other => fail!(EINVAL, "is of version {other}; this library knows version {VERSION}"),
    }
    if crc32fast::hash(&file[16..]) != (word(8) >> 32) as u32 {
        fail!(EINVAL, "is damaged (its checksum is wrong), or was cut short");
    }
    let recorded = Shape { bytes: word(16), end: Gpa(word(24)) };
    if recorded != shape {
        fail!(
            EINVAL,
            "is of another VM: with {:#x} bytes of memory up to {:#x}; this one has {:#x} up to {:#x}",
            recorded.bytes,
            recorded.end,
            shape.bytes,
            shape.end
        );
    }
    // The checksum detects accidents, not intent: nothing below trusts what it reads.
    let mut rest = &file[HEADER..];
    let (count, most) = (word(32), most_records(shape));
    if count > most {
        fail!(EINVAL, "has {count} records; the VM has {most} pages");
    }
    if count > rest.len() as u64 / 3 {
        fail!(EINVAL, "has {} bytes for {count} records", rest.len());
    }
    let mut records = room_for(count as usize, "records")?;
    let (mut expected, mut us) = (0u64, 0u64);
    for n in 0..count {
        let numbers = [get(&mut rest), get(&mut rest), get(&mut rest)];
        let [Some(zigzag), Some(pages), Some(after)] = numbers else { fail!(EINVAL, "ends in record {n}") };
        let page = expected.wrapping_add((zigzag >> 1) ^ (zigzag & 1).wrapping_neg());
        let end = page.checked_add(pages).filter(|end| end.checked_mul(UNIT).is_some_and(|end| end <= shape.end.0));
        let Some(end) = end.filter(|_| pages > 0) else { fail!(EINVAL, "record {n} is not in the VM's memory") };
        us = us.saturating_add(after);
        records.push(Record { gpa: Gpa(page * UNIT), pages, us });
        expected = end;
    }
    if !rest.is_empty() {
        fail!(EINVAL, "has {} bytes too many", rest.len());
    }
    Ok(records)
}

/// Guest addresses in the order in which to fetch them: the order of time, with neighbours
/// together.
pub fn plan(records: &[Record]) -> Result<Vec<Range<Gpa>>> {
    let mut plan: Vec<Range<Gpa>> = room_for(records.len(), "records")?;
    for group in records.chunks(TOGETHER) {
        let mut group: Vec<_> = group.iter().map(|r| r.gpa..r.gpa + r.pages * UNIT).collect();
        group.sort_unstable_by_key(|range| range.start);
        let first = plan.len();
        for range in group {
            match plan[first..].last_mut() {
                Some(before) if range.start <= before.end => before.end = before.end.max(range.end),
                _ => plan.push(range),
            }
        }
    }
    Ok(plan)
}

/// Writes an unsigned LEB128 number.
fn put(to: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        to.push(number as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

/// Reads the next number; None if there is none, or it does not fit.
fn get(from: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = from.split_first()?;
        *from = rest;
        let bits = u64::from(byte & 0x7f);
        number |= bits << shift;
        if byte < 0x80 {
            return (bits << shift >> shift == bits).then_some(number);
        }
    }
    None
}

/// Says in an error which file it is about.
pub fn about_the_file(error: Error) -> Error {
    Error::new(error.errno, format!("working_set_fd: the file {}", error.message))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape { bytes: 1 << 30, end: Gpa(5 << 30) };

    fn some() -> Vec<Record> {
        let record = |page, pages, us| Record { gpa: Gpa(page * UNIT), pages, us };
        vec![record(1000, 1, 5), record(1001, 64, 5), record(0, 4096, 90), record((5 << 30) / UNIT - 1, 1, 1 << 40)]
    }

    #[test]
    fn what_was_written_is_read() {
        let file = encode(SHAPE, &some()).unwrap();
        assert_eq!(decode(&file, SHAPE).unwrap(), some());
        assert_eq!(decode(&encode(SHAPE, &[]).unwrap(), SHAPE).unwrap(), []);
        // A sequential run takes at most four bytes a fault.
        let run: Vec<_> = (0..1000).map(|n| Record { gpa: Gpa(n * 64 * UNIT), pages: 64, us: n * 100 }).collect();
        assert!(encode(SHAPE, &run).unwrap().len() <= HEADER + 4 * run.len());
    }

    #[test]
    fn whatever_is_wrong_with_a_file_is_said() {
        let file = encode(SHAPE, &some()).unwrap();
        let refused = |file: &[u8], words: &str| {
            let error = decode(file, SHAPE).unwrap_err();
            assert_eq!(error.errno, libc::EINVAL);
            assert!(error.message.contains(words), "{error}");
        };
        for len in 0..file.len() {
            assert!(decode(&file[..len], SHAPE).is_err(), "cut to {len} bytes");
        }
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut broken = file.clone();
                broken[at] ^= 1 << bit;
                assert!(decode(&broken, SHAPE).is_err(), "bit {bit} of byte {at}");
            }
        }
        refused(b"", "not a working set");
        refused(&[file.clone(), vec![0]].concat(), "damaged");
        refused(&[&file[..8], &[2, 0, 0, 0], &file[12..]].concat(), "version 2");
        let other = Shape { bytes: 2 << 30, ..SHAPE };
        refused(&encode(other, &some()).unwrap(), "another VM");
        assert!(decode(&file, Shape { end: Gpa(6 << 30), ..SHAPE }).unwrap_err().message.contains("another VM"));
    }

    /// Nonsense with a correct checksum.
    #[test]
    fn nonsense_is_refused() {
        let sealed = |records: u64, body: &[u8]| {
            let words = [SHAPE.bytes, SHAPE.end.0, records].map(u64::to_le_bytes).concat();
            let content = [&words, body].concat();
            let crc = crc32fast::hash(&content).to_le_bytes();
            [MAGIC.as_slice(), &VERSION.to_le_bytes(), &crc, &content].concat()
        };
        let far = (SHAPE.end.0 / UNIT) << 1;
        let mut beyond = Vec::new();
        put(&mut beyond, far);
        let below = [1, 1, 0]; // one page below the first
        let cases: [(u64, Vec<u8>); 8] = [
            (1, vec![]),
            (u64::MAX, vec![0, 1, 0]),
            (1, vec![0, 0, 0]),
            (1, vec![0, 1, 0, 7]),
            (1, [beyond, vec![1, 0]].concat()),
            (1, below.to_vec()),
            (1, [vec![0xff; 9], vec![0x7f, 1, 0]].concat()),
            (1, [vec![0], vec![0xff; 9], vec![1, 0]].concat()),
        ];
        for (records, body) in cases {
            assert_eq!(decode(&sealed(records, &body), SHAPE).unwrap_err().errno, libc::EINVAL, "{records}, {body:?}");
        }
        assert_eq!(decode(&sealed(1, &[0, 1, 0]), SHAPE).unwrap().len(), 1);
    }

    #[test]
    fn neighbours_are_fetched_together() {
        let page = |n: u64| Record { gpa: Gpa(n * UNIT), pages: 1, us: 0 };
        let early: Vec<_> = [9, 3, 4, 8, 3].map(page).to_vec();
        let unit = |n: u64| Gpa(n * UNIT);
        assert_eq!(plan(&early).unwrap(), [unit(3)..unit(5), unit(8)..unit(10)]);
        let mut long: Vec<_> = (0..TOGETHER as u64).rev().map(page).collect();
        long.push(page(5000));
        long.push(page(TOGETHER as u64));
        let pages = unit(TOGETHER as u64);
        assert_eq!(plan(&long).unwrap(), [unit(0)..pages, pages..pages + UNIT, unit(5000)..unit(5001)]);
    }

    /// Random files, and files that were cut, mutated or extended, all with a correct checksum:
    /// none causes a panic, and no more memory is taken than the VM's size warrants.
    #[test]
    fn any_file_is_read_or_refused() {
        let shape = Shape { bytes: 1 << 20, end: Gpa(5 << 20) };
        let mut state = 1u64;
        let mut random = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 33
        };
        let records: Vec<_> =
            (0..most_records(shape)).map(|n| Record { gpa: Gpa(n * 5 % 1280 * UNIT), pages: 1, us: n * n }).collect();
        let good = encode(shape, &records).unwrap();
        let (mut read, mut refused) = (0, 0);
        for round in 0..20_000 {
            let mut file = good.clone();
            if round % 4 == 0 {
                file.truncate(HEADER);
                file.extend((0..random() % 4000).map(|_| random() as u8));
            }
            for _ in 0..random() % 4 {
                let at = 32 + random() as usize % (file.len() - 32);
                file[at] = [random() as u8, 0, 0x7f, 0x80, 0xff][random() as usize % 5];
            }
            match random() % 4 {
                0 => file.truncate(HEADER + random() as usize % (file.len() - HEADER + 1)),
                1 => file.extend((0..random() % 64).map(|_| random() as u8)),
                _ => {}
            }
            let crc = crc32fast::hash(&file[16..]);
            file[12..16].copy_from_slice(&crc.to_le_bytes());
            match decode(&file, shape) {
                Ok(records) => {
                    assert!(records.capacity() as u64 <= most_records(shape));
                    assert!(records.iter().all(|r| r.pages > 0 && r.gpa + r.pages * UNIT <= shape.end));
                    let plan = plan(&records).unwrap();
                    assert!(plan.len() <= records.len() && plan.capacity() as u64 <= most_records(shape));
                    read += 1;
                }
                Err(e) => {
                    assert_eq!(e.errno, libc::EINVAL, "{e}");
                    refused += 1;
                }
            }
        }
        assert!(read > 100 && refused > 100, "{read} read, {refused} refused");
    }
}
