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
            /// The address `len` bytes on; None if there is none.
            #[inline]
            pub fn checked_add(self, len: u64) -> Option<Self> {
                self.0.checked_add(len).map(Self)
            }

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
        assert_eq!((Gpa(5) - Gpa(3), Gpa(3).wrapping_sub(Gpa(5)), Gpa(0x1234) % 0x1000), (2, u64::MAX - 1, 0x234));
    }
}
