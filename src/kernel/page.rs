//! The sizes of pages.

pub use super::arch::page_size;
use once_cell::sync::Lazy;

/// The size of transparent huge pages: what the kernel says (read once), or without a /sys what one
/// table of page-table entries maps.
pub fn huge_page_size() -> u64 {
    static SIZE: Lazy<u64> = Lazy::new(|| {
        let told = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").ok();
        let size = told.and_then(|text| text.trim().parse().ok()).filter(|&size| is_huge_page_size(size));
        size.unwrap_or(page_size() * (page_size() / 8))
    });
    *SIZE
}

fn is_huge_page_size(size: u64) -> bool {
    size.is_power_of_two() && size > page_size()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_kernels() {
        // SAFETY: sysconf takes a number.
        assert_eq!(page_size(), unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64);
        assert!(is_huge_page_size(huge_page_size()) && huge_page_size() % page_size() == 0);
        assert!(![0, 1, page_size(), 3 * page_size()].into_iter().any(is_huge_page_size));
    }
}
