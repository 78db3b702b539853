//! Memory for the tests of this room.

use super::block::{Block, Shape};
use super::Memory;
use crate::error::Result;
use crate::kernel::address::Hva;
use crate::kernel::host_memory::HostMemory;
use crate::kernel::mem::{self, Kind, Mapping};
use crate::kernel::page::page_size;
use crate::kernel::uffd::{Mode, Uffd};

/// Private memory with a number of absent pages.
pub fn memory_and_block(pages: u64) -> Result<(Memory, Mapping, Block)> {
    let memory = Memory::new(Uffd::open()?, false);
    let ram = Mapping::anonymous(pages * page_size()).unwrap();
    memory.uffd.register(ram.whole(), Mode::default()).unwrap();
    let shape = Shape {
        memory: HostMemory::for_test(ram.address(), pages * page_size()),
        page: page_size(),
        kind: Kind::Anon,
        mechanism: 0,
    };
    let block = Block::new(shape, None, false, false).unwrap();
    Ok((memory, ram, block))
}

/// The byte at an address.
pub fn byte(hva: Hva) -> u8 {
    let mut byte = [0xee];
    mem::read(hva, &mut byte).unwrap();
    byte[0]
}
