//! What the VMM does with pages.

use super::vm::Vm;
use crate::error::{fail, Result};
use crate::kernel::address::{Gpa, Hva};
use crate::memory::pages::State;
use crate::memory::source::Source;

/// The state of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PageState {
    /// Never installed, or discarded: the next access calls the resolver.
    Absent,
    /// A resolver call for it is under way, or it was announced
    /// ([`Answer::Pending`](crate::Answer::Pending)).
    Resolving,
    /// Its bytes are in place.
    Present,
    /// It can't be had: an access gets a memory error.
    Lost,
}

impl PageState {
    fn of(state: State) -> PageState {
        match state {
            State::Absent => PageState::Absent,
            State::Resolving => PageState::Resolving,
            State::Present => PageState::Present,
            State::Lost => PageState::Lost,
        }
    }

    fn bit(self) -> u32 {
        let state = match self {
            PageState::Absent => State::Absent,
            PageState::Resolving => State::Resolving,
            PageState::Present => State::Present,
            PageState::Lost => State::Lost,
        };
        1 << state as u32
    }
}

/// Pages. All addresses are guest physical (but where `hva` is said) and, like lengths, multiples
/// of the memory's page size; a range lies inside one memslot. `ENOENT` is an address in no
/// memslot, `EINVAL` a range that isn't so.
impl Vm {
    /// Installs pages with these bytes: the guest, this process and threads that wait see them at
    /// once. Pages that are present already keep their bytes; `EEXIST` if all are. `EHWPOISON` if a
    /// page is lost. Also from callbacks.
    pub fn install(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        self.inner()?.install(Gpa(gpa), bytes.len() as u64, Source::Copy(Hva(bytes.as_ptr() as u64)))
    }

    /// Installs pages of zeros. Otherwise as [`install`](Self::install).
    pub fn zero(&self, gpa: u64, len: u64) -> Result<()> {
        self.inner()?.install(Gpa(gpa), len, Source::Zero)
    }

    /// Installs pages of shared memory whose bytes are in the page cache already, written through
    /// another mapping or by another process; `ENOENT` if a page is not there, `EINVAL` for private
    /// memory. Otherwise as [`install`](Self::install).
    pub fn map(&self, gpa: u64, len: u64) -> Result<()> {
        self.inner()?.install(Gpa(gpa), len, Source::Map)
    }

    /// Marks absent pages lost: vCPUs that touch them get
    /// [`Exit::MemoryError`](crate::Exit::MemoryError), threads SIGBUS, and system calls `EFAULT`.
    /// `EEXIST` if none of the range is absent. Also from callbacks.
    pub fn lose(&self, gpa: u64, len: u64) -> Result<()> {
        self.inner()?.lose(Gpa(gpa), len)
    }

    /// Makes present or lost pages absent again: their bytes go, and the resolver is asked for them
    /// at the next access. What the guest gave up is for [`give_back`](Self::give_back). Not from
    /// callbacks.
    pub fn discard(&self, gpa: u64, len: u64) -> Result<()> {
        self.outside_callbacks("Vm::discard")?.discard(Gpa(gpa), len)
    }

    /// The guest has given these pages up (a balloon, free page reporting): their memory goes to
    /// the system, and they read as zeros at the next access. The resolver is never asked for them.
    /// Not from callbacks.
    pub fn give_back(&self, gpa: u64, len: u64) -> Result<()> {
        self.outside_callbacks("Vm::give_back")?.give_back(Gpa(gpa), len)
    }

    /// Pages that were announced ([`Answer::Pending`](crate::Answer::Pending)) and have not come
    /// are absent again, and the resolver is asked anew. Returns how many there were. Also from
    /// callbacks.
    pub fn withdraw(&self, gpa: u64, len: u64) -> Result<u64> {
        self.inner()?.withdraw(Gpa(gpa), len)
    }

    /// Fetches pages now, through the resolver, on the calling thread. For memory that must be
    /// present before something touches it that can't wait, or fails quietly. Not from callbacks.
    pub fn resolve(&self, gpa: u64, len: u64) -> Result<()> {
        self.outside_callbacks("Vm::resolve")?.resolve(Gpa(gpa), len)
    }

    /// The state of the page that holds an address.
    pub fn state(&self, gpa: u64) -> Result<PageState> {
        self.inner()?.state(Gpa(gpa)).map(PageState::of)
    }

    /// How many pages of all memory are not there yet. Takes about 10 ms a TiB.
    pub fn absent(&self) -> u64 {
        self.inner().map_or(0, |vm| vm.absent())
    }

    /// Sets a bit for each page of a range that is in one of `states`, from bit 0 of the first word
    /// on, and clears the other bits of the words that it needs. Returns how many bits are set;
    /// `EINVAL` if `bitmap` is too short.
    pub fn bitmap(&self, gpa: u64, len: u64, states: &[PageState], bitmap: &mut [u64]) -> Result<u64> {
        let states = states.iter().fold(0, |set, state| set | state.bit());
        if states == 0 {
            fail!(EINVAL, "states: is empty");
        }
        let size = size_of_val(bitmap) as u64;
        self.inner()?.bitmap(Gpa(gpa), len, states, size, |offset, bytes| {
            let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(std::array::from_fn(|n| word[n])));
            bitmap[offset as usize / 8..].iter_mut().zip(words).for_each(|(to, word)| *to = word);
            Ok(())
        })
    }

    /// With [`VmOptions::external_uffd`](crate::VmOptions::external_uffd): the VMM's mapping has
    /// these pages now. `hva` is the address in it. Also from callbacks.
    pub fn arrived(&self, hva: u64, len: u64) -> Result<()> {
        self.inner()?.arrived(Hva(hva), len)
    }

    /// With [`VmOptions::external_uffd`](crate::VmOptions::external_uffd): the VMM's mapping
    /// doesn't have these pages. The VMM has registered them with its userfaultfd, and dropped
    /// their bytes, before this. Not from callbacks.
    pub fn missing(&self, hva: u64, len: u64) -> Result<()> {
        self.outside_callbacks("Vm::missing")?.missing(Hva(hva), len)
    }
}
