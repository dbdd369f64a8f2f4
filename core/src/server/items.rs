//! Items of the server's btrees as values: one kind of value per zone, always of
//! the exact length, always with seq 0 and no flags (spec 01 section 13).

use super::error::{Result, ServerError};
use crate::block::{Cache, Tx};
use crate::btree;
use crate::format::{BtreeRoot, Key, LogTrees, MountedClient, ZONE_LOG_TREES, ZONE_MOUNTED_CLIENT};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The value of an item, if it has the right length.
pub(super) fn parse<T: FromBytes>(key: Key, value: &[u8]) -> Result<T> {
    T::read_from_bytes(value).map_err(|_| ServerError::ItemSize {
        key,
        found: value.len(),
        expected: size_of::<T>(),
    })
}

/// The item with this key.
pub(super) async fn get<T: FromBytes>(
    cache: &Cache,
    root: &BtreeRoot,
    key: Key,
) -> Result<Option<T>> {
    match btree::lookup(cache, root, &key).await? {
        Some(item) => parse(key, &item.value).map(Some),
        None => Ok(None),
    }
}

/// The first item from `key` to `last`.
pub(super) async fn next<T: FromBytes>(
    cache: &Cache,
    root: &BtreeRoot,
    key: Key,
    last: Key,
) -> Result<Option<(Key, T)>> {
    match btree::next(cache, root, &key).await? {
        Some(item) if item.key <= last => Ok(Some((item.key, parse(item.key, &item.value)?))),
        _ => Ok(None),
    }
}

/// The last item from `first` to `key`.
pub(super) async fn prev<T: FromBytes>(
    cache: &Cache,
    root: &BtreeRoot,
    key: Key,
    first: Key,
) -> Result<Option<(Key, T)>> {
    match btree::prev(cache, root, &key).await? {
        Some(item) if item.key >= first => Ok(Some((item.key, parse(item.key, &item.value)?))),
        _ => Ok(None),
    }
}

/// Every item from `first` to `last` in key order.
pub(super) async fn all<T: FromBytes>(
    cache: &Cache,
    root: &BtreeRoot,
    first: Key,
    last: Key,
) -> Result<Vec<(Key, T)>> {
    let mut found = Vec::new();
    let mut from = first;
    while let Some((key, value)) = next(cache, root, from, last).await? {
        found.push((key, value));
        if key >= last {
            break;
        }
        from = key.inc();
    }
    Ok(found)
}

/// Stores an item, new or not.
pub(super) async fn put<T: IntoBytes + Immutable>(
    tx: &Tx,
    root: &mut BtreeRoot,
    key: Key,
    value: &T,
) -> Result<()> {
    Ok(btree::force(tx, root, &key, value.as_bytes()).await?)
}

/// Deletes an item; whether it was there.
pub(super) async fn delete(tx: &Tx, root: &mut BtreeRoot, key: Key) -> Result<bool> {
    if btree::lookup(tx.cache(), root, &key).await?.is_none() {
        return Ok(false);
    }
    btree::delete(tx, root, &key).await?;
    Ok(true)
}

/// First and last possible key of a zone.
pub(super) const fn zone(zone: u8) -> (Key, Key) {
    let all = u64::MAX;
    (
        Key::new(zone, 0, 0, 0, 0, 0),
        Key::new(zone, all, u8::MAX, all, all, u8::MAX),
    )
}

/// The newest log tree of a mount: the one with the greatest nr.
pub(super) async fn newest_log_trees(
    cache: &Cache,
    logs_root: &BtreeRoot,
    rid: u64,
) -> Result<Option<LogTrees>> {
    let (first, last) = (Key::log_trees(rid, 0), Key::log_trees(rid, u64::MAX));
    let found = prev(cache, logs_root, last, first).await?;
    Ok(found.map(|(_, log)| log))
}

/// The newest log tree of each mount, by rid.
pub(super) async fn newest_of_each(cache: &Cache, logs_root: &BtreeRoot) -> Result<Vec<LogTrees>> {
    let (mut from, last) = zone(ZONE_LOG_TREES);
    let mut found = Vec::new();
    while let Some((key, _)) = next::<LogTrees>(cache, logs_root, from, last).await? {
        let newest = newest_log_trees(cache, logs_root, key.first).await?;
        found.push(newest.ok_or(ServerError::ItemMissing(key))?);
        match key.first.checked_add(1) {
            Some(rid) => from = Key::log_trees(rid, 0),
            None => break,
        }
    }
    Ok(found)
}

/// Every log trees item by (rid, nr).
pub(super) async fn all_log_trees(cache: &Cache, logs_root: &BtreeRoot) -> Result<Vec<LogTrees>> {
    let (first, last) = zone(ZONE_LOG_TREES);
    let items = all(cache, logs_root, first, last).await?;
    Ok(items.into_iter().map(|(_, log)| log).collect())
}

/// Every mounted client by rid.
pub(super) async fn all_mounted(
    cache: &Cache,
    mounted_clients: &BtreeRoot,
) -> Result<Vec<(u64, MountedClient)>> {
    let (first, last) = zone(ZONE_MOUNTED_CLIENT);
    let items = all(cache, mounted_clients, first, last).await?;
    Ok(items
        .into_iter()
        .map(|(key, client)| (key.first, client))
        .collect())
}
