//! Buffers for direct I/O: aligned, owned, and shared without copying once full.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment and granularity of device I/O, in bytes: one small block.
pub const ALIGN: usize = 4096;

/// Lengths of buffers that are kept for the next user, and how many of each one
/// thread keeps. Fresh memory costs a page fault for every 4 KiB of it, which for
/// these is more than the transfer itself.
const KEPT: [(usize, usize); 3] = [(64 << 10, 256), (1 << 20, 64), ((1 << 20) + 2 * ALIGN, 64)];

thread_local! {
    static SPARE: RefCell<[Vec<Alloc>; KEPT.len()]> = const { RefCell::new([const { Vec::new() }; KEPT.len()]) };
}

/// Owned memory aligned to [`ALIGN`] bytes, every byte of it initialised.
struct Alloc {
    ptr: NonNull<u8>,
    len: usize,
}

impl Alloc {
    fn kept_class(len: usize) -> Option<usize> {
        KEPT.iter().position(|(kept, _)| *kept == len)
    }

    /// Memory that an earlier user left behind, if there is some.
    fn spare(len: usize) -> Option<Self> {
        let class = Self::kept_class(len)?;
        // The thread may be about to end, and its spares gone.
        SPARE
            .try_with(|spare| spare.borrow_mut()[class].pop())
            .ok()
            .flatten()
    }

    fn fresh(len: usize) -> Self {
        let layout = Self::layout(len);
        // SAFETY: the layout has a non-zero size, asserted in `layout`.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else {
            handle_alloc_error(layout)
        };
        Self { ptr, len }
    }

    fn layout(len: usize) -> Layout {
        assert!(
            len > 0 && len.is_multiple_of(ALIGN),
            "bad I/O buffer length {len}"
        );
        Layout::from_size_align(len, ALIGN)
            .expect("an I/O buffer length that fits the address space")
    }
}

impl Drop for Alloc {
    fn drop(&mut self) {
        // SAFETY: allocated in `fresh` with the same layout, freed once.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) }
    }
}

/// An owned buffer aligned to [`ALIGN`] bytes, whose length is a multiple of it.
pub struct AlignedBuf {
    /// `None` only while it is dropped.
    alloc: Option<Alloc>,
    /// The part of the memory that is the buffer; it begins on an [`ALIGN`] border.
    from: usize,
    len: usize,
}

impl AlignedBuf {
    /// A zero-filled buffer of `len` bytes.
    ///
    /// # Panics
    /// If `len` is zero or not a multiple of [`ALIGN`].
    pub fn zeroed(len: usize) -> Self {
        match Alloc::spare(len) {
            Some(alloc) => {
                let mut buf = Self::whole(alloc);
                buf.fill(0);
                buf
            }
            None => Self::whole(Alloc::fresh(len)),
        }
    }

    /// A buffer of `len` bytes for somebody who fills all of it before anybody
    /// looks: it holds zeros, or what an earlier user left.
    ///
    /// # Panics
    /// As [`AlignedBuf::zeroed`].
    pub fn to_fill(len: usize) -> Self {
        Self::whole(Alloc::spare(len).unwrap_or_else(|| Alloc::fresh(len)))
    }

    /// A buffer holding a copy of `bytes`.
    ///
    /// # Panics
    /// As [`AlignedBuf::zeroed`] for `bytes.len()`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Self::to_fill(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    fn whole(alloc: Alloc) -> Self {
        let len = alloc.len;
        Self {
            alloc: Some(alloc),
            from: 0,
            len,
        }
    }

    /// The part of `len` bytes from byte `from` on, without copying; the rest of
    /// the buffer is given up.
    ///
    /// # Panics
    /// If `from` or `len` is not a multiple of [`ALIGN`], `len` is zero, or the
    /// part does not lie in the buffer.
    #[must_use]
    pub fn part(mut self, from: usize, len: usize) -> Self {
        let end = from.checked_add(len).expect("a part's end");
        assert!(
            from.is_multiple_of(ALIGN) && len.is_multiple_of(ALIGN) && len > 0 && end <= self.len,
            "part of {len} bytes at {from} of a buffer of {}",
            self.len
        );
        self.from += from;
        self.len = len;
        self
    }

    fn alloc(&self) -> &Alloc {
        self.alloc.as_ref().expect("a buffer that is not dropped")
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let Some(alloc) = self.alloc.take() else {
            return;
        };
        if let Some(class) = Alloc::kept_class(alloc.len) {
            let _ = SPARE.try_with(|spare| {
                let spare = &mut spare.borrow_mut()[class];
                if spare.len() < KEPT[class].1 {
                    spare.push(alloc);
                }
            });
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the memory owns these initialised bytes.
        unsafe { std::slice::from_raw_parts(self.alloc().ptr.as_ptr().add(self.from), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let ptr = self.alloc().ptr.as_ptr();
        // SAFETY: the memory owns these initialised bytes, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(ptr.add(self.from), self.len) }
    }
}

impl Clone for AlignedBuf {
    fn clone(&self) -> Self {
        Self::copy_of(self)
    }
}

impl std::fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

// SAFETY: it is plain owned memory.
unsafe impl Send for Alloc {}
// SAFETY: shared access only reads.
unsafe impl Sync for Alloc {}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

/// A finished buffer, shared by the cache, the I/O in flight and replies to the
/// kernel (`Bytes::from_owner`).
pub type IoBuf = Arc<AlignedBuf>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_was_used_before_is_zero_where_zeros_were_asked_for() {
        for (len, _) in KEPT {
            let mut used = AlignedBuf::zeroed(len);
            used.fill(7);
            let at = used.as_ptr();
            drop(used);
            let again = AlignedBuf::zeroed(len);
            assert_eq!(again.as_ptr(), at, "the memory was not kept");
            assert!(again.iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn a_part_is_the_same_memory_and_gives_all_of_it_back() {
        let mut whole = AlignedBuf::zeroed(1 << 20);
        whole[ALIGN] = 1;
        whole[3 * ALIGN - 1] = 2;
        let at = whole.as_ptr();
        let part = whole.part(ALIGN, 2 * ALIGN);
        assert_eq!(
            (part.len(), part[0], part[2 * ALIGN - 1]),
            (2 * ALIGN, 1, 2)
        );
        assert_eq!(part.as_ptr(), at.wrapping_add(ALIGN));
        let inner = part.part(ALIGN, ALIGN);
        assert_eq!((inner.len(), inner[ALIGN - 1]), (ALIGN, 2));
        drop(inner);
        assert_eq!(AlignedBuf::to_fill(1 << 20).as_ptr(), at);
    }

    #[test]
    #[should_panic(expected = "part of 4096 bytes")]
    fn a_part_outside_of_the_buffer_is_refused() {
        let _ = AlignedBuf::zeroed(2 * ALIGN).part(2 * ALIGN, ALIGN);
    }
}
