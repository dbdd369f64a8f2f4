//! One transaction over the metadata: dirty blocks, the lists that its blocks
//! come from and go to, and their ordered write-out (spec 02 sections 4 and 5,
//! spec 03 sections 5 and 6).
//!
//! A client transaction, a server commit, a merge and a compaction are each one
//! [`Tx`]. Methods take `&self`, so that tasks of one actor may share it; who
//! changes one tree must still be one at a time.
//!
//! Why the recursion ends: changing a tree takes blocks from the first block of
//! `avail` and gives old ones to the first block of `freed`, nothing else; those
//! two are copied once per transaction, with their new numbers taken from
//! `avail` itself.
//!
//! What can go wrong: a list that runs empty or full. Callers size transactions
//! beforehand with [`Tx::remaining`], so both are violated budgets; they are
//! found before anything changes. After a failed write or flush everything
//! stays dirty, and the next attempt writes all of it again.

use super::list::{ListBlock, ListBlockMut, verify_first, verify_list};
use super::{Block, BlockError, Cache, Corruption, Policy};
use crate::env::{AlignedBuf, LocalBoxFuture, WriteFlags, mutant, probe};
use crate::format::{
    AllocListHead, BlockRef, LG_BLOCK_SHIFT, LG_BLOCK_SIZE, META_DEV_START_BLKNO, Magic,
    init_header, read_header, seal,
};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;

/// Entries left in the running lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Blocks that can be allocated.
    pub avail: u32,
    /// Blocks that can be freed.
    pub freed: u32,
}

impl Room {
    /// Whether both lists have at least `n` entries left.
    pub fn fits(&self, n: u32) -> bool {
        self.avail >= n && self.freed >= n
    }
}

/// What was left at some moment, to measure use against a budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(Room);

#[derive(Default)]
struct State {
    avail: AllocListHead,
    freed: AllocListHead,
    /// The heads given by [`Tx::new`] or [`Tx::set_heads`].
    start: (AllocListHead, AllocListHead),
    /// Whether the first blocks of both lists are dirty and ready for use.
    open: bool,
    dirty: BTreeSet<u64>,
    /// Blocks whose copies are dirty.
    replaced: Vec<u64>,
    /// Whether all dirty blocks were written and wait only for the flush.
    written: bool,
    /// Whether they were written so that no flush is needed.
    durable: bool,
}

/// A transaction: see the head of this file.
pub struct Tx {
    cache: Rc<Cache>,
    id: u64,
    state: RefCell<State>,
    opening: tokio::sync::Mutex<()>,
    writing: Cell<bool>,
}

impl std::fmt::Debug for Tx {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Tx({} dirty, {:?})",
            self.dirty_blocks(),
            self.remaining()
        )
    }
}

impl Tx {
    /// A transaction that allocates from `avail` and frees to `freed`.
    pub fn new(cache: Rc<Cache>, avail: AllocListHead, freed: AllocListHead) -> Self {
        let id = cache.new_tx_id();
        let tx = Self {
            cache,
            id,
            state: RefCell::default(),
            opening: tokio::sync::Mutex::new(()),
            writing: Cell::new(false),
        };
        tx.set_heads(avail, freed);
        tx
    }

    /// The cache, for reads that see this transaction's dirty blocks.
    pub fn cache(&self) -> &Rc<Cache> {
        &self.cache
    }

    /// The thresholds in use.
    pub fn policy(&self) -> &Policy {
        self.cache.policy()
    }

    /// The running heads: what to store once the transaction is written.
    pub fn heads(&self) -> (AllocListHead, AllocListHead) {
        let state = self.state.borrow();
        (state.avail, state.freed)
    }

    /// Takes other lists, for the next transaction.
    pub fn set_heads(&self, avail: AllocListHead, freed: AllocListHead) {
        let state = &mut *self.state.borrow_mut();
        (state.avail, state.freed) = (avail, freed);
        state.start = (avail, freed);
        state.open = false;
    }

    /// Number of dirty blocks.
    pub fn dirty_blocks(&self) -> usize {
        self.state.borrow().dirty.len()
    }

    /// The dirty blocks' numbers, ascending.
    pub fn dirty_blknos(&self) -> Vec<u64> {
        self.state.borrow().dirty.iter().copied().collect()
    }

    /// Whether `blkno` is dirty in this transaction.
    pub fn is_dirty(&self, blkno: u64) -> bool {
        self.state.borrow().dirty.contains(&blkno)
    }

    /// Whether `head` is one of the running lists, which fill, empty and splice
    /// must not touch (spec 03 section 6).
    pub fn is_running(&self, head: &AllocListHead) -> bool {
        let state = self.state.borrow();
        let same =
            |own: &AllocListHead| !own.block_ref.is_null() && own.block_ref == head.block_ref;
        same(&state.avail) || same(&state.freed)
    }

    /// Entries left in the lists, counting the fresh block that the first use
    /// rotates into a nearly full freed list (spec 03 section 5).
    pub fn remaining(&self) -> Room {
        let state = self.state.borrow();
        let policy = self.policy();
        let mut freed = policy.list_max.saturating_sub(state.freed.first_nr.get());
        if !state.open && freed < policy.list_rotate {
            freed = policy.list_max - 2;
        }
        Room {
            avail: state.avail.first_nr.get(),
            freed,
        }
    }

    /// Whether fewer than `n` blocks can be allocated or freed.
    pub fn meta_low(&self, n: u32) -> bool {
        let state = self.state.borrow();
        let freed = self
            .policy()
            .list_max
            .saturating_sub(state.freed.first_nr.get());
        state.avail.first_nr.get() < n || freed < n
    }

    /// What is left now, for [`Tx::low_since`].
    pub fn mark(&self) -> Mark {
        Mark(self.remaining())
    }

    /// Whether using `n` more entries would exceed `budget` since `mark`.
    pub fn low_since(&self, mark: Mark, budget: u32, n: u32) -> bool {
        let used = self.used_since(mark);
        used.avail.saturating_add(n) > budget || used.freed.saturating_add(n) > budget
    }

    /// Entries used since `mark`.
    pub fn used_since(&self, mark: Mark) -> Room {
        let now = self.remaining();
        Room {
            avail: mark.0.avail.saturating_sub(now.avail),
            freed: mark.0.freed.saturating_sub(now.freed),
        }
    }

    /// Allocates one block (spec 03 section 5).
    ///
    /// # Errors
    /// `NoSpace` if the list is empty; read errors of the lists at first use.
    pub async fn alloc_meta(&self) -> Result<u64, BlockError> {
        self.open().await?;
        self.take()
    }

    /// Frees one block: it can be allocated only after this transaction is
    /// stable and its freed list was taken back.
    ///
    /// # Errors
    /// `OutOfRange`, `FreedFull`; read errors of the lists at first use.
    pub async fn free_meta(&self, blkno: u64) -> Result<(), BlockError> {
        self.check_range(blkno)?;
        self.open().await?;
        self.check_freed_room()?;
        self.put(blkno);
        Ok(())
    }

    /// Puts a new first block before the running freed list, in the middle of the
    /// transaction: as many blocks can be freed as in a fresh list. Costs one block.
    ///
    /// # Errors
    /// As [`Tx::alloc_meta`]; then nothing changed.
    pub async fn rotate_freed(&self) -> Result<(), BlockError> {
        let blkno = self.alloc_meta().await?;
        probe("freed_list_rotated_within");
        let old = self.state.borrow().freed.block_ref;
        let first = self.create(blkno, AlignedBuf::zeroed(LG_BLOCK_SIZE), Magic::AllocList);
        self.edit(blkno, |bytes| ListBlockMut::new(bytes).head().next = old);
        let freed = &mut self.state.borrow_mut().freed;
        (freed.block_ref, freed.first_nr) = (first, 0.into());
        Ok(())
    }

    /// Gives the running avail list more blocks, which nobody owns and no stable super
    /// refers to.
    ///
    /// # Errors
    /// As [`Tx::alloc_meta`]; then nothing changed.
    ///
    /// # Panics
    /// If the list has no room for them.
    pub(crate) async fn add_avail(
        &self,
        blknos: impl IntoIterator<Item = u64>,
    ) -> Result<(), BlockError> {
        self.open().await?;
        self.note_change();
        let state = &mut *self.state.borrow_mut();
        let list = state.avail.block_ref.blkno.get();
        self.cache.edit(list, self.id, |bytes| {
            let mut block = ListBlockMut::new(bytes);
            for blkno in blknos {
                block.add(&mut state.avail, blkno);
            }
            block.sort();
        });
        Ok(())
    }

    /// Frees a block that nothing refers to any more; if it is dirty here it is
    /// not written either.
    ///
    /// # Errors
    /// As [`Tx::free_meta`].
    pub async fn free_block(&self, blkno: u64) -> Result<(), BlockError> {
        self.free_meta(blkno).await?;
        if self.is_dirty(blkno) {
            self.forget(blkno);
        }
        Ok(())
    }

    /// Makes the block that `block_ref` names writable: in place if it is dirty
    /// here, else as a copy under a new number, with the old one freed. A null
    /// reference gives a new block of zeros (spec 02 section 4).
    ///
    /// # Errors
    /// Read errors of the old block, `NoSpace`, `FreedFull`; then nothing changed.
    pub async fn dirty_ref(
        &self,
        block_ref: &mut BlockRef,
        magic: Magic,
    ) -> Result<(), BlockError> {
        if block_ref.is_null() {
            self.open().await?;
            let blkno = self.take()?;
            *block_ref = self.create(blkno, AlignedBuf::zeroed(LG_BLOCK_SIZE), magic);
            return Ok(());
        }
        let old = self.cache.read_ref(block_ref, magic).await?;
        self.dirty_from(block_ref, &old, magic).await
    }

    /// As [`Tx::dirty_ref`], for a block that was just read (and validated).
    ///
    /// # Errors
    /// `NoSpace`, `FreedFull`; then nothing changed.
    pub async fn dirty_from(
        &self,
        block_ref: &mut BlockRef,
        old: &Rc<Block>,
        magic: Magic,
    ) -> Result<(), BlockError> {
        let old_blkno = block_ref.blkno.get();
        if self.is_dirty(old_blkno) {
            return Ok(());
        }
        self.check_range(old_blkno)?;
        self.open().await?;
        self.check_freed_room()?;
        let blkno = self.take()?;
        *block_ref = self.create(blkno, AlignedBuf::copy_of(old.bytes()), magic);
        self.state.borrow_mut().replaced.push(old_blkno);
        self.put(old_blkno);
        Ok(())
    }

    /// Reads a block that is dirty here. `f` must not use the cache.
    ///
    /// # Panics
    /// If the block is not dirty in this transaction.
    pub fn view<R>(&self, blkno: u64, f: impl FnOnce(&[u8]) -> R) -> R {
        f(&self.cache.dirty_buf(blkno, self.id))
    }

    /// Changes a block that is dirty here. `f` must not use the cache.
    ///
    /// # Panics
    /// If the block is not dirty in this transaction, or a write is under way.
    pub fn edit<R>(&self, blkno: u64, f: impl FnOnce(&mut [u8]) -> R) -> R {
        self.note_change();
        self.cache.edit(blkno, self.id, f)
    }

    /// Changes two different dirty blocks at once; see [`Tx::edit`].
    pub fn edit2<R>(&self, a: u64, b: u64, f: impl FnOnce(&mut [u8], &mut [u8]) -> R) -> R {
        self.note_change();
        self.cache.edit2((a, b), self.id, f)
    }

    /// Drops one dirty block without writing it.
    ///
    /// # Panics
    /// If it is not dirty here.
    pub fn forget(&self, blkno: u64) {
        assert!(
            self.state.borrow_mut().dirty.remove(&blkno),
            "block {blkno} is not dirty here"
        );
        self.cache.forget(blkno, self.id);
    }

    /// Abandons the transaction: no block is written and the heads are those
    /// that it started with.
    pub fn forget_all(&self) {
        let state = &mut *self.state.borrow_mut();
        for blkno in std::mem::take(&mut state.dirty) {
            self.cache.forget(blkno, self.id);
        }
        (state.avail, state.freed) = state.start;
        state.replaced.clear();
        state.open = false;
        state.written = false;
    }

    /// Ends the use of the lists; the next allocation copies them again. Their
    /// heads ([`Tx::heads`]) are persistent once the blocks are written.
    pub fn prepare_commit(&self) {
        self.state.borrow_mut().open = false;
    }

    /// Writes all dirty blocks and flushes the device; then they are clean.
    ///
    /// # Errors
    /// Any device error: all blocks stay dirty and the call may be repeated.
    pub async fn write(&self) -> Result<(), BlockError> {
        self.write_blocks().await?;
        self.flush().await
    }

    /// The first half of [`Tx::write`]: every dirty block is written and
    /// complete, but not flushed, and still dirty.
    ///
    /// # Errors
    /// As [`Tx::write`].
    pub async fn write_blocks(&self) -> Result<(), BlockError> {
        self.write_as(false).await
    }

    /// As [`Tx::write_blocks`]; where the blocks make few requests, each of them is
    /// durable when it ends, and [`Tx::flush`] has nothing left to do. Not for who
    /// relies on the flush for the blocks of others too.
    ///
    /// # Errors
    /// As [`Tx::write`].
    pub async fn write_blocks_durably(&self) -> Result<(), BlockError> {
        let runs = self.runs(&self.dirty_blknos());
        let few = runs <= self.policy().fua_requests;
        self.write_as(few && self.policy().flush).await
    }

    async fn write_as(&self, durable: bool) -> Result<(), BlockError> {
        let _writing = Writing::start(self);
        let res = self.write_all(WriteFlags { fua: durable }).await;
        let state = &mut *self.state.borrow_mut();
        state.written = res.is_ok();
        state.durable = durable;
        if durable && res.is_ok() {
            probe("tx.written_durably");
        }
        res
    }

    /// How many requests write these blocks.
    fn runs(&self, blknos: &[u64]) -> usize {
        let (mut rest, mut runs) = (blknos, 0);
        while !rest.is_empty() {
            rest = &rest[adjacent_run(rest, self.policy().write_batch_blocks)..];
            runs += 1;
        }
        runs
    }

    /// The second half of [`Tx::write`]: what was written is durable and clean.
    ///
    /// # Errors
    /// As [`Tx::write`]; the blocks must be written again.
    ///
    /// # Panics
    /// If blocks were changed since [`Tx::write_blocks`].
    pub async fn flush(&self) -> Result<(), BlockError> {
        let _writing = Writing::start(self);
        assert!(
            self.state.borrow().written,
            "flush of blocks that were not written"
        );
        let durable = self.state.borrow().durable;
        let res = match durable {
            true => Ok(()),
            false => self.cache.flush().await,
        };
        let state = &mut *self.state.borrow_mut();
        state.written = false;
        res?;
        for blkno in std::mem::take(&mut state.replaced) {
            self.cache.drop_replaced(blkno);
        }
        for blkno in std::mem::take(&mut state.dirty) {
            self.cache.mark_clean(blkno, self.id);
        }
        state.start = (state.avail, state.freed);
        Ok(())
    }

    fn note_change(&self) {
        assert!(
            !self.writing.get(),
            "a dirty block changed while it was written"
        );
        self.state.borrow_mut().written = false;
    }

    async fn write_all(&self, flags: WriteFlags) -> Result<(), BlockError> {
        let blknos = self.dirty_blknos();
        for blkno in &blknos {
            self.cache.edit(*blkno, self.id, seal);
        }
        let (batch, depth) = (self.policy().write_batch_blocks, self.policy().write_depth);
        let mut rest = &blknos[..];
        let mut in_flight: Vec<LocalBoxFuture<'_, Result<(), BlockError>>> = Vec::new();
        let mut failed = None;
        poll_fn(|cx| {
            loop {
                while in_flight.len() < depth && !rest.is_empty() && failed.is_none() {
                    let (run, after) = rest.split_at(adjacent_run(rest, batch));
                    rest = after;
                    in_flight.push(self.write_run(run, flags));
                }
                let before = in_flight.len();
                in_flight.retain_mut(|write| match write.as_mut().poll(cx) {
                    Poll::Ready(res) => {
                        failed = failed.take().or(res.err());
                        false
                    }
                    Poll::Pending => true,
                });
                if in_flight.is_empty() && (rest.is_empty() || failed.is_some()) {
                    return Poll::Ready(());
                }
                if in_flight.len() == before {
                    return Poll::Pending;
                }
            }
        })
        .await;
        failed.map_or(Ok(()), Err)
    }

    /// Writes blocks with adjacent numbers in one request.
    fn write_run(
        &self,
        run: &[u64],
        flags: WriteFlags,
    ) -> LocalBoxFuture<'static, Result<(), BlockError>> {
        let blkno = run[0];
        let bufs = run
            .iter()
            .map(|blkno| self.cache.dirty_buf(*blkno, self.id))
            .collect();
        let write = self
            .cache
            .device()
            .write(blkno << LG_BLOCK_SHIFT, bufs, flags);
        Box::pin(async move { write.await.map_err(|err| BlockError::device(blkno, err)) })
    }

    /// Whether a block is one of the volume's.
    pub(crate) fn check_range(&self, blkno: u64) -> Result<(), BlockError> {
        let total = self.cache.total_blocks();
        if (META_DEV_START_BLKNO..total).contains(&blkno) {
            return Ok(());
        }
        Err(BlockError::OutOfRange { blkno, total })
    }

    fn check_freed_room(&self) -> Result<(), BlockError> {
        if self.state.borrow().freed.first_nr.get() >= self.policy().list_max {
            probe("freed_list_full");
            return Err(BlockError::FreedFull);
        }
        Ok(())
    }

    /// Takes the first available block; the lists are open.
    fn take(&self) -> Result<u64, BlockError> {
        self.note_change();
        let state = &mut *self.state.borrow_mut();
        let list = state.avail.block_ref.blkno.get();
        let taken = self.cache.edit(list, self.id, |bytes| {
            let mut block = ListBlockMut::new(bytes);
            let blkno = block.first()?;
            block.remove(&mut state.avail, 1);
            Some(blkno)
        });
        let Some(blkno) = taken else {
            probe("avail_list_empty");
            return Err(BlockError::NoSpace);
        };
        if self.cache.dirty_in(blkno).is_some() {
            return Err(BlockError::Corrupt(Corruption {
                blkno: list,
                what: format!("it lists block {blkno}, which is in use"),
            }));
        }
        Ok(blkno)
    }

    /// Puts a block in the freed list; the lists are open and there is room.
    fn put(&self, blkno: u64) {
        self.note_change();
        let state = &mut *self.state.borrow_mut();
        // Mutant: breaks spec 03 section 21, "frees never feed allocations of
        // the same transaction".
        let reuse = mutant("freed_block_reused");
        let head = if reuse {
            &mut state.avail
        } else {
            &mut state.freed
        };
        self.cache
            .edit(head.block_ref.blkno.get(), self.id, |bytes| {
                let mut block = ListBlockMut::new(bytes);
                block.add(head, blkno);
                if reuse {
                    block.last_first();
                }
            });
    }

    /// Puts a new dirty block in the cache.
    fn create(&self, blkno: u64, mut buf: AlignedBuf, magic: Magic) -> BlockRef {
        let seq = self.cache.new_seq();
        init_header(&mut buf, magic, self.cache.fsid(), blkno, seq);
        self.cache.insert_dirty(blkno, Arc::new(buf), self.id);
        self.note_change();
        assert!(
            self.state.borrow_mut().dirty.insert(blkno),
            "block {blkno} is dirty twice"
        );
        BlockRef::new(blkno, seq)
    }

    /// Makes the first blocks of both lists dirty at first use. All reads come
    /// before the first change, so an error changes nothing.
    async fn open(&self) -> Result<(), BlockError> {
        if self.state.borrow().open {
            return Ok(());
        }
        let _one_at_a_time = self.opening.lock().await;
        if self.state.borrow().open {
            return Ok(());
        }
        let (mut avail, mut freed) = self.heads();
        if avail.block_ref.is_null() || avail.first_nr.get() < 2 {
            probe("avail_list_empty_at_start");
            return Err(BlockError::NoSpace);
        }
        let avail_block = self.read_first(&avail).await?;
        let old_freed = freed;
        // Mutant: breaks spec 03 section 9, a full first block gets a new one before it.
        let rotates = !mutant("freed_list_not_rotated")
            && !freed.block_ref.is_null()
            && self.policy().list_max.saturating_sub(freed.first_nr.get())
                < self.policy().list_rotate;
        let freed_block = if rotates || freed.block_ref.is_null() {
            freed.block_ref = BlockRef::default();
            freed.first_nr = 0.into();
            None
        } else {
            Some(self.read_first(&freed).await?)
        };
        let spare = self.spare_blocks(&avail_block)?;
        let mut frees = Vec::with_capacity(2);
        let mut used = 0;
        if !self.is_dirty(avail.block_ref.blkno.get()) {
            frees.push(avail.block_ref.blkno.get());
            let buf = AlignedBuf::copy_of(avail_block.bytes());
            avail.block_ref = self.create(spare[used], buf, Magic::AllocList);
            used += 1;
        }
        if !self.is_dirty(freed.block_ref.blkno.get()) {
            let buf = match &freed_block {
                Some(block) => {
                    frees.push(freed.block_ref.blkno.get());
                    AlignedBuf::copy_of(block.bytes())
                }
                None => AlignedBuf::zeroed(LG_BLOCK_SIZE),
            };
            freed.block_ref = self.create(spare[used], buf, Magic::AllocList);
            used += 1;
        }
        self.edit(avail.block_ref.blkno.get(), |bytes| {
            let mut block = ListBlockMut::new(bytes);
            block.remove(&mut avail, used as u32);
            block.sort();
        });
        self.edit(freed.block_ref.blkno.get(), |bytes| {
            let mut block = ListBlockMut::new(bytes);
            if rotates {
                probe("freed_list_rotated");
                block.head().next = old_freed.block_ref;
            }
            for blkno in frees {
                block.add(&mut freed, blkno);
            }
        });
        let state = &mut *self.state.borrow_mut();
        (state.avail, state.freed, state.open) = (avail, freed, true);
        Ok(())
    }

    /// The first two entries of the avail list, which become its own copy and
    /// the copy of the freed list.
    fn spare_blocks(&self, avail: &Block) -> Result<[u64; 2], BlockError> {
        let entries = ListBlock::new(avail.bytes()).entries();
        let spare = [entries[0].get(), entries[1].get()];
        match spare.iter().find(|b| self.cache.dirty_in(**b).is_some()) {
            Some(used) => Err(BlockError::Corrupt(Corruption {
                blkno: read_header(avail.bytes()).blkno.get(),
                what: format!("it lists block {used}, which is in use"),
            })),
            None => Ok(spare),
        }
    }

    /// Reads the first block of a list that only we write, and checks it
    /// against its head.
    pub(crate) async fn read_first(&self, head: &AllocListHead) -> Result<Rc<Block>, BlockError> {
        let block = self.read_list(&head.block_ref).await?;
        verify_first(block.bytes(), head, self.cache.total_blocks())
            .map_err(BlockError::Corrupt)?;
        Ok(block)
    }

    /// Reads any block of a list that only we write.
    pub(crate) async fn read_list(&self, block_ref: &BlockRef) -> Result<Rc<Block>, BlockError> {
        let read = self.cache.read_ref(block_ref, Magic::AllocList).await;
        let block = read.map_err(BlockError::owned)?;
        block.check_once(verify_list)?;
        Ok(block)
    }
}

impl Drop for Tx {
    /// An abandoned transaction leaves nothing dirty behind.
    fn drop(&mut self) {
        self.forget_all();
    }
}

/// How many of the first numbers are adjacent, up to `max`.
fn adjacent_run(blknos: &[u64], max: usize) -> usize {
    let adjacent = blknos.windows(2).take_while(|pair| pair[0] + 1 == pair[1]);
    (adjacent.count() + 1).min(max)
}

/// Marks that blocks are being written and must not change.
struct Writing<'a>(&'a Tx);

impl<'a> Writing<'a> {
    fn start(tx: &'a Tx) -> Self {
        assert!(
            !tx.writing.replace(true),
            "two writes of one transaction at once"
        );
        Self(tx)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.writing.set(false);
    }
}
