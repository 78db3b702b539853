//! Addresses, each kind with a type of its own: what is meant for one can't be passed for another.

use std::fmt;
use std::ops::{Add, AddAssign, Rem, Sub};

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The distance from `start`, modulo 2^64: what is below `start` is far away.
            #[inline]
            pub fn wrapping_sub(self, start: Self) -> u64 {
                self.0.wrapping_sub(start.0)
            }
        }

        impl Add<u64> for $name {
            type Output = Self;
            #[inline]
            fn add(self, len: u64) -> Self {
                Self(self.0 + len)
            }
        }

        impl AddAssign<u64> for $name {
            #[inline]
            fn add_assign(&mut self, len: u64) {
                self.0 += len;
            }
        }

        /// The distance from an address that is not above.
        impl Sub for $name {
            type Output = u64;
            #[inline]
            fn sub(self, start: Self) -> u64 {
                self.0 - start.0
            }
        }

        /// The offset in a page of this size.
        impl Rem<u64> for $name {
            type Output = u64;
            #[inline]
            fn rem(self, page: u64) -> u64 {
                self.0 % page
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// A guest physical address.
    Gpa
}

impl Gpa {
    /// The address `len` bytes on; None if there is none.
    #[inline]
    pub fn checked_add(self, len: u64) -> Option<Gpa> {
        self.0.checked_add(len).map(Gpa)
    }
}

address! {
    /// A host virtual address: of guest memory in this process, or of bytes that go there.
    Hva
}

impl Hva {
    /// The address `len` bytes on, or the last one.
    #[inline]
    pub fn saturating_add(self, len: u64) -> Hva {
        Hva(self.0.saturating_add(len))
    }

    /// The distance from `start`; 0 if that is above.
    #[inline]
    pub fn saturating_sub(self, start: Hva) -> u64 {
        self.0.saturating_sub(start.0)
    }

    /// For system calls that take a pointer.
    #[inline]
    pub fn as_ptr<T>(self) -> *mut T {
        self.0 as *mut T
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_show_addresses_in_hexadecimal() {
        let gpa = Gpa(0x1000);
        assert_eq!(format!("{gpa:#x} {gpa:x} {gpa:?} {:?}", gpa..gpa + 1), "0x1000 1000 0x1000 0x1000..0x1001");
    }

    #[test]
    fn addresses_end() {
        assert_eq!((Gpa(1).checked_add(u64::MAX), Gpa(0).checked_add(u64::MAX)), (None, Some(Gpa(u64::MAX))));
        assert_eq!((Hva(1).saturating_add(u64::MAX), Hva(1).saturating_sub(Hva(2))), (Hva(u64::MAX), 0));
        assert_eq!((Gpa(5) - Gpa(3), Gpa(3).wrapping_sub(Gpa(5)), Gpa(0x1234) % 0x1000), (2, u64::MAX - 1, 0x234));
    }
}
