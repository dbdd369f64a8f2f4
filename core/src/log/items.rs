//! Item operations (spec 04 section 3.4). Each names the lock that covers its
//! key; changes also need a [`Hold`]. All complete at once when the keys are known.

use super::cache::{Change, ItemCache, Known, KnownNext, UnknownKey};
use super::{Hold, Inner, Log, LogError};
use crate::btree;
use crate::format::{Key, MAX_ITEM_VALUE};
use crate::locks::{LockGuard, Mode};
use bytes::Bytes;

/// Checks that the lock covers the key and was taken in a mode that permits
/// `needed` (section 3.1, rule 1).
fn check(guard: &LockGuard, key: &Key, needed: Mode) -> Result<(), LogError> {
    if !guard.covers(key) {
        let (key, scope) = (*key, guard.scope());
        return Err(LogError::NotCovered { key, scope });
    }
    check_mode(guard, needed)
}

fn check_mode(guard: &LockGuard, needed: Mode) -> Result<(), LogError> {
    let had = guard.mode();
    match had.satisfies(needed) {
        true => Ok(()),
        false => Err(LogError::WrongMode { needed, had }),
    }
}

fn check_value(key: &Key, value: &[u8]) -> Result<(), LogError> {
    if value.len() > MAX_ITEM_VALUE {
        let (key, len) = (*key, value.len());
        return Err(LogError::ValueTooLong { key, len });
    }
    Ok(())
}

/// The seq of an item written now (section 2).
pub(super) fn item_seq(trans_seq: u64, write_seq: u64, primary_write_seq: Option<u64>) -> u64 {
    trans_seq.max(write_seq).max(primary_write_seq.unwrap_or(0))
}

impl Inner {
    /// Applies a change, reading its key in first as often as it is unknown.
    async fn change(
        &self,
        guard: &LockGuard,
        key: &Key,
        change: impl Fn(&mut ItemCache) -> Change,
    ) -> Result<(), LogError> {
        self.check_alive()?;
        loop {
            let changed = change(&mut self.cache.borrow_mut());
            match changed {
                Ok(result) => return result,
                Err(UnknownKey) => self.read_in(guard, key).await?,
            }
        }
    }
}

impl Log {
    /// The item's value.
    ///
    /// # Errors
    /// `NotCovered`, `WrongMode` (needs READ); read errors.
    pub async fn lookup(&self, guard: &LockGuard, key: &Key) -> Result<Option<Bytes>, LogError> {
        check(guard, key, Mode::Read)?;
        self.inner.check_alive()?;
        loop {
            let known = self.inner.cache.borrow_mut().lookup(key);
            match known {
                Known::Value(value) => return Ok(Some(value)),
                Known::Absent => return Ok(None),
                Known::Unknown => self.inner.read_in(guard, key).await?,
            }
        }
    }

    /// The value of an item whose kind has values of `N` bytes.
    ///
    /// # Errors
    /// `ValueLength` for another length; as [`Log::lookup`].
    pub async fn lookup_exact<const N: usize>(
        &self,
        guard: &LockGuard,
        key: &Key,
    ) -> Result<Option<[u8; N]>, LogError> {
        let Some(value) = self.lookup(guard, key).await? else {
            return Ok(None);
        };
        let exact = <[u8; N]>::try_from(&value[..]);
        exact.map(Some).map_err(|_| LogError::ValueLength {
            key: *key,
            expected: N,
            found: value.len(),
        })
    }

    /// Fills `buf` with the item's value and zeros after it: for kinds that grew
    /// with format versions. The value's length.
    ///
    /// # Errors
    /// `ValueLength` if the value is longer than `buf`; as [`Log::lookup`].
    pub async fn lookup_smaller_zero(
        &self,
        guard: &LockGuard,
        key: &Key,
        buf: &mut [u8],
    ) -> Result<Option<usize>, LogError> {
        let Some(value) = self.lookup(guard, key).await? else {
            return Ok(None);
        };
        if value.len() > buf.len() {
            return Err(LogError::ValueLength {
                key: *key,
                expected: buf.len(),
                found: value.len(),
            });
        }
        let (head, rest) = buf.split_at_mut(value.len());
        head.copy_from_slice(&value);
        rest.fill(0);
        Ok(Some(value.len()))
    }

    /// The first item at or after `key` up to `last` or the end of the lock's
    /// range, whichever comes first.
    ///
    /// # Errors
    /// As [`Log::lookup`].
    pub async fn next(
        &self,
        guard: &LockGuard,
        key: &Key,
        last: &Key,
    ) -> Result<Option<(Key, Bytes)>, LogError> {
        check(guard, key, Mode::Read)?;
        self.inner.check_alive()?;
        let last = guard.range().end.min(*last);
        let mut from = *key;
        loop {
            let known = self.inner.cache.borrow_mut().next(from, &last);
            match known {
                KnownNext::Item(key, value) => return Ok(Some((key, value))),
                KnownNext::None => return Ok(None),
                KnownNext::Unknown(at) => {
                    self.inner.read_in(guard, &at).await?;
                    from = at;
                }
            }
        }
    }

    /// Marks an existing item as changed, so that a later update or delete in the
    /// same hold needs no read.
    ///
    /// # Errors
    /// `NotFound`; `NotCovered`, `WrongMode` (needs WRITE); read errors.
    pub async fn dirty(&self, hold: &Hold, guard: &LockGuard, key: &Key) -> Result<(), LogError> {
        check(guard, key, Mode::Write)?;
        let seq = self.seq(hold, guard, None);
        let inner = &self.inner;
        inner
            .change(guard, key, |cache| cache.update(key, None, seq))
            .await
    }

    /// Adds an item.
    ///
    /// # Errors
    /// `Exists`, `ValueTooLong`; as [`Log::dirty`].
    pub async fn create(
        &self,
        hold: &Hold,
        guard: &LockGuard,
        key: &Key,
        value: Bytes,
    ) -> Result<(), LogError> {
        check(guard, key, Mode::Write)?;
        check_value(key, &value)?;
        let seq = self.seq(hold, guard, None);
        let inner = &self.inner;
        inner
            .change(guard, key, |cache| cache.create(key, value.clone(), seq))
            .await
    }

    /// Replaces an item's value.
    ///
    /// # Errors
    /// `NotFound`, `ValueTooLong`; as [`Log::dirty`].
    pub async fn update(
        &self,
        hold: &Hold,
        guard: &LockGuard,
        key: &Key,
        value: Bytes,
    ) -> Result<(), LogError> {
        check(guard, key, Mode::Write)?;
        check_value(key, &value)?;
        let seq = self.seq(hold, guard, None);
        let inner = &self.inner;
        let value = Some(value);
        inner
            .change(guard, key, |cache| cache.update(key, value.clone(), seq))
            .await
    }

    /// Deletes an item.
    ///
    /// # Errors
    /// `NotFound`; as [`Log::dirty`].
    pub async fn delete(&self, hold: &Hold, guard: &LockGuard, key: &Key) -> Result<(), LogError> {
        check(guard, key, Mode::Write)?;
        let seq = self.seq(hold, guard, None);
        let inner = &self.inner;
        inner
            .change(guard, key, |cache| cache.delete(key, seq))
            .await
    }

    /// Writes an item under a WRITE_ONLY lock, whatever is there. `primary` is
    /// the WRITE lock that really orders the changes of this item, if there is one.
    ///
    /// # Errors
    /// `ValueTooLong`, `NotCovered`, `WrongMode` (needs WRITE_ONLY, and WRITE of `primary`).
    pub async fn create_force(
        &self,
        hold: &Hold,
        guard: &LockGuard,
        key: &Key,
        value: Bytes,
        primary: Option<&LockGuard>,
    ) -> Result<(), LogError> {
        check_value(key, &value)?;
        self.force(hold, guard, key, Some(value), primary).await
    }

    /// Deletes an item under a WRITE_ONLY lock, whether it exists or not; see
    /// [`Log::create_force`].
    ///
    /// # Errors
    /// `NotCovered`, `WrongMode` (needs WRITE_ONLY, and WRITE of `primary`).
    pub async fn delete_force(
        &self,
        hold: &Hold,
        guard: &LockGuard,
        key: &Key,
        primary: Option<&LockGuard>,
    ) -> Result<(), LogError> {
        self.force(hold, guard, key, None, primary).await
    }

    async fn force(
        &self,
        hold: &Hold,
        guard: &LockGuard,
        key: &Key,
        value: Option<Bytes>,
        primary: Option<&LockGuard>,
    ) -> Result<(), LogError> {
        check(guard, key, Mode::WriteOnly)?;
        primary.map_or(Ok(()), |primary| check_mode(primary, Mode::Write))?;
        let seq = self.seq(hold, guard, primary);
        let inner = &self.inner;
        inner
            .change(guard, key, |cache| cache.force(key, value.clone(), seq))
            .await
    }

    /// Adds to a total under a WRITE_ONLY lock (section 3.5): `value` is a total
    /// and a count, 8 bytes little endian each.
    ///
    /// # Errors
    /// `NotDelta` for keys without deltas, `ValueLength`; `NotCovered`,
    /// `WrongMode` (needs WRITE_ONLY).
    pub async fn delta(
        &self,
        hold: &Hold,
        guard: &LockGuard,
        key: &Key,
        value: Bytes,
    ) -> Result<(), LogError> {
        check(guard, key, Mode::WriteOnly)?;
        if !btree::is_delta(key) {
            return Err(LogError::NotDelta(*key));
        }
        if value.len() != 16 {
            return Err(LogError::ValueLength {
                key: *key,
                expected: 16,
                found: value.len(),
            });
        }
        if value.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let seq = self.seq(hold, guard, None);
        let inner = &self.inner;
        inner
            .change(guard, key, |cache| cache.delta(key, value.clone(), seq))
            .await
    }

    fn seq(&self, hold: &Hold, guard: &LockGuard, primary: Option<&LockGuard>) -> u64 {
        let trans_seq = hold.open(&self.inner).seq;
        item_seq(
            trans_seq,
            guard.write_seq(),
            primary.map(LockGuard::write_seq),
        )
    }
}
