//! What a client reads from the metadata device itself (spec 08 section 6): where
//! the server is, and whether this mount is still on its list.
//!
//! What can go wrong: trusting a cache. Other hosts wrote these blocks, so each
//! look starts from the device, with a block cache of its own for the tree.

use crate::block;
use crate::btree::{self, BtreeError};
use crate::env::{BlockDevice, Env};
use crate::format::{Key, SuperBlock};
use crate::quorum::{BlockIo, QuorumBlockError, Slots, find_servers};
use std::net::SocketAddrV4;
use std::rc::Rc;
use thiserror::Error;

/// Why the devices gave no answer.
#[derive(Debug, Error)]
pub enum LocateError {
    /// A super or quorum block is unreadable.
    #[error(transparent)]
    Block(#[from] QuorumBlockError),
    /// The super block is of another format version than the mounted one.
    #[error("the super block now has format version {found}, mounted was {mounted}")]
    FormatVersion {
        /// Version mounted.
        mounted: u64,
        /// Version found.
        found: u64,
    },
    /// No quorum slot shows a running server (ENOENT).
    #[error("no quorum slot shows a running server")]
    NoServer,
    /// The tree of mounted clients can not be read.
    #[error("mounted clients: {0}")]
    Btree(#[from] BtreeError),
}

/// Looks at the volume from outside.
pub struct Locator {
    env: Env,
    dev: Rc<dyn BlockDevice>,
    io: BlockIo,
    fsid: u64,
    fmt_vers: u64,
}

impl Locator {
    /// For the volume on metadata device `dev`.
    pub fn new(env: &Env, dev: Rc<dyn BlockDevice>, fsid: u64, fmt_vers: u64) -> Self {
        Self {
            env: env.clone(),
            io: BlockIo::new(dev.clone(), fsid),
            dev,
            fsid,
            fmt_vers,
        }
    }

    async fn read_super(&self) -> Result<SuperBlock, LocateError> {
        let sb = self.io.read_super().await?;
        let found = sb.fmt_vers.get();
        if found != self.fmt_vers {
            return Err(LocateError::FormatVersion {
                mounted: self.fmt_vers,
                found,
            });
        }
        Ok(sb)
    }

    /// Addresses at which the quorum blocks say that the server may be, the likeliest
    /// first, at least one. It may be gone, or not listen yet.
    ///
    /// # Errors
    /// If any block of a present slot is unreadable, or none names a server.
    pub async fn find_servers(&self) -> Result<Vec<SocketAddrV4>, LocateError> {
        let slots = Slots::of(&self.read_super().await?.qconf);
        let mut blocks = Vec::new();
        for (slot, _) in slots.iter() {
            blocks.push((slot, self.io.read(slot).await?));
        }
        let found = find_servers(blocks.iter().map(|(slot, block)| (*slot, block)));
        let found: Vec<_> = found.into_iter().filter_map(|n| slots.addr(n)).collect();
        match found.is_empty() {
            true => Err(LocateError::NoServer),
            false => Ok(found),
        }
    }

    /// Whether the current super lists `rid` as a mounted client.
    ///
    /// # Errors
    /// If a block is unreadable or was overwritten meanwhile: no answer.
    pub async fn is_mounted(&self, rid: u64) -> Result<bool, LocateError> {
        let sb = self.read_super().await?;
        let policy = Rc::new(block::Policy::default());
        let entropy = self.env.entropy.clone();
        let cache = block::Cache::new(self.dev.clone(), entropy, self.fsid, policy);
        let key = Key::mounted_client(rid);
        let item = btree::lookup(&cache, &sb.mounted_clients, &key).await?;
        Ok(item.is_some())
    }
}
