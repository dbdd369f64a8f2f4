//! Commands that read or change the super block alone: inode numbers, roots,
//! seqs, volume options, sizes, free space (spec 08 section 8).

use super::error::{OrFatal, Result, ServerError};
use super::items;
use super::store::{Dirty, Store};
use crate::alloc::{self, StatfsSums};
use crate::block::StaleCheck;
use crate::env::{mutant, probe};
use crate::errno::Errno;
use crate::format::{
    InetAddr, Key, MOUNTED_CLIENT_FLAG_QUORUM, MountedClient, NetInodeAlloc, NetResizeDevices,
    NetRoots, NetStatfs, SuperBlock, VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT, VOLOPT_KNOWN_BITS,
    VolumeOptions,
};
use crate::volume::check_data_zone_blocks;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;

impl Store {
    /// ALLOC_INODES: up to `count` inode numbers that nobody ever had.
    ///
    /// # Errors
    /// If the commit fails; the numbers are lost then, never reused.
    pub async fn alloc_inodes(self: &Rc<Self>, count: u64) -> Result<NetInodeAlloc> {
        self.change(async |d| {
            let ino = d.sup.next_ino.get();
            let nr = count.min(u64::MAX - ino);
            d.sup.next_ino = (ino + nr).into();
            Ok(NetInodeAlloc {
                ino: ino.into(),
                nr: nr.into(),
            })
        })
        .await
    }

    /// GET_ROOTS: the roots of the stable super.
    pub fn roots(&self) -> NetRoots {
        let sup = self.stable();
        NetRoots {
            fs_root: sup.fs_root,
            logs_root: sup.logs_root,
            srch_root: sup.srch_root,
        }
    }

    /// GET_LAST_SEQ: the greatest seq with no open transaction at or below it, as
    /// of the stable super: what is being written may yet be lost (spec 04 section
    /// 12). All seqs of transactions that the stable super does not know are greater
    /// than its seq.
    ///
    /// # Errors
    /// If the log trees can not be read.
    pub async fn last_seq(&self) -> Result<u64> {
        self.retry_stale(async |sup| {
            let mut last = sup.seq.get().saturating_sub(1);
            for log in items::newest_of_each(&self.cache, &sup.logs_root).await? {
                // Mutant: breaks spec 04 section 12, open transactions hold the seq back.
                let open = log.is_open() && !mutant("last_seq_ignores_open");
                if !open || log.get_trans_seq.get() > last {
                    continue;
                }
                let key = Key::mounted_client(log.rid.get());
                let mounted: Option<MountedClient> =
                    items::get(&self.cache, &sup.mounted_clients, key).await?;
                if mounted.is_some() {
                    last = log.get_trans_seq.get() - 1;
                }
            }
            Ok(last)
        })
        .await
    }

    /// STATFS, of the stable super.
    ///
    /// # Errors
    /// If a structure that holds free blocks can not be read.
    pub async fn statfs(&self) -> Result<NetStatfs> {
        self.retry_stale(async |sup| {
            let sums: StatfsSums = alloc::read_statfs(&self.cache, sup).await?;
            Ok(NetStatfs {
                uuid: sup.uuid,
                free_meta_blocks: sums.free_meta_blocks.into(),
                total_meta_blocks: sup.total_meta_blocks,
                free_data_blocks: sums.free_data_blocks.into(),
                total_data_blocks: sup.total_data_blocks,
                inode_count: sums.inode_count.into(),
            })
        })
        .await
    }

    /// Runs a reader on the stable super, from the start again if commits went on
    /// and reused a block under it.
    pub(super) async fn retry_stale<T>(
        &self,
        read: impl AsyncFn(&SuperBlock) -> Result<T>,
    ) -> Result<T> {
        let mut check = StaleCheck::new();
        loop {
            let sup = self.stable();
            let err = match read(&sup).await {
                Err(err) if err.is_stale() => err,
                other => return other,
            };
            probe("server.stable_read.stale");
            if !check.retry([sup.logs_root.block_ref, sup.srch_root.block_ref]) {
                return Err(err);
            }
        }
    }

    /// GET_VOLOPT: the options in use, those of the stable super.
    pub fn volopt(&self) -> VolumeOptions {
        self.stable().volopt
    }

    /// SET_VOLOPT.
    ///
    /// # Errors
    /// EINVAL for an unknown option or a value that the data device does not allow.
    pub async fn set_volopt(self: &Rc<Self>, wanted: VolumeOptions) -> Result<()> {
        self.change_volopt(async |sup| {
            check_known(&wanted)?;
            if let Some(zone_blocks) = wanted.data_zone_blocks() {
                check_data_zone_blocks(zone_blocks, sup.total_data_blocks.get())?;
                sup.volopt.data_alloc_zone_blocks = zone_blocks.into();
                sup.volopt.set_bits |= VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT;
            }
            Ok(())
        })
        .await
    }

    /// CLEAR_VOLOPT.
    ///
    /// # Errors
    /// EINVAL for an unknown option.
    pub async fn clear_volopt(self: &Rc<Self>, unwanted: VolumeOptions) -> Result<()> {
        self.change_volopt(async |sup| {
            check_known(&unwanted)?;
            if unwanted.data_zone_blocks().is_some() {
                sup.volopt.data_alloc_zone_blocks = 0.into();
                sup.volopt.set_bits &= !VOLOPT_DATA_ALLOC_ZONE_BLOCKS_BIT;
            }
            Ok(())
        })
        .await
    }

    /// Changes options; if the commit fails they are as before.
    async fn change_volopt(
        self: &Rc<Self>,
        change: impl AsyncFnOnce(&mut SuperBlock) -> Result<()>,
    ) -> Result<()> {
        let hold = self.hold().await?;
        let (before, result, after) = {
            let d = &mut *self.dirty().await;
            let before = d.sup.volopt;
            let result = change(&mut d.sup).await;
            (before, result, d.sup.volopt)
        };
        let applied = hold.apply(result).await;
        if applied.is_err() {
            let d = &mut *self.dirty().await;
            if d.sup.volopt == after {
                d.sup.volopt = before;
            }
        }
        applied
    }

    /// RESIZE_DEVICES: grows the volume into devices that have grown already.
    ///
    /// # Errors
    /// EINVAL if a size shrinks or is above the device's.
    pub async fn resize(self: &Rc<Self>, wanted: NetResizeDevices) -> Result<()> {
        self.change(async |d| self.grow(d, wanted).await).await
    }

    async fn grow(&self, d: &mut Dirty, wanted: NetResizeDevices) -> Result<()> {
        let changed = |new: u64, old: u64| (new != 0 && new != old).then_some(new);
        let old_meta = d.sup.total_meta_blocks.get();
        let old_data = d.sup.total_data_blocks.get();
        let meta = changed(wanted.new_total_meta_blocks.get(), old_meta);
        let data = changed(wanted.new_total_data_blocks.get(), old_data);
        let fits = |new: Option<u64>, old, most| new.is_none_or(|new| new > old && new <= most);
        if !fits(meta, old_meta, self.meta_device_blocks())
            || !fits(data, old_data, self.data_device_blocks())
        {
            return Err(ServerError::Refused(Errno::EINVAL));
        }
        if let Some(new) = meta {
            alloc::insert_extent(&self.tx, d.meta_avail(), old_meta, new - old_meta)
                .await
                .or_fatal()?;
            d.sup.total_meta_blocks = new.into();
            self.cache.set_total_blocks(new);
        }
        if let Some(new) = data {
            alloc::insert_extent(&self.tx, &mut d.sup.data_alloc, old_data, new - old_data)
                .await
                .or_fatal()?;
            d.sup.total_data_blocks = new.into();
        }
        Ok(())
    }

    /// Records that a mount may hold state, before its first greeting is answered.
    ///
    /// # Errors
    /// If the commit fails.
    pub async fn insert_mounted(
        self: &Rc<Self>,
        rid: u64,
        addr: SocketAddrV4,
        quorum: bool,
    ) -> Result<()> {
        let key = Key::mounted_client(rid);
        let stable: Option<MountedClient> =
            items::get(&self.cache, &self.stable().mounted_clients, key).await?;
        if stable.is_some() && self.is_mounted(rid).await? {
            probe("server.greeting.resent");
            return Ok(());
        }
        self.change(async |d| {
            let found: Option<MountedClient> =
                items::get(&self.cache, &d.sup.mounted_clients, key).await?;
            if found.is_some() {
                return Ok(());
            }
            let client = MountedClient {
                addr: InetAddr::from_v4(addr),
                flags: if quorum {
                    MOUNTED_CLIENT_FLAG_QUORUM
                } else {
                    0
                },
                ..MountedClient::default()
            };
            items::put(&self.tx, &mut d.sup.mounted_clients, key, &client).await
        })
        .await
    }

    /// Whether a mount has a mounted client item, as of the dirty state.
    ///
    /// # Errors
    /// If the item can not be read.
    pub async fn is_mounted(&self, rid: u64) -> Result<bool> {
        let d = self.dirty().await;
        let key = Key::mounted_client(rid);
        let found: Option<MountedClient> =
            items::get(&self.cache, &d.sup.mounted_clients, key).await?;
        Ok(found.is_some())
    }

    /// Where a mounted client first came from; `None` if it is not mounted. An
    /// unusable address reads as 0.0.0.0: it is only a hint for the fence agent.
    ///
    /// # Errors
    /// If the item can not be read.
    pub async fn mounted_addr(&self, rid: u64) -> Result<Option<SocketAddrV4>> {
        let d = self.dirty().await;
        let key = Key::mounted_client(rid);
        let found: Option<MountedClient> =
            items::get(&self.cache, &d.sup.mounted_clients, key).await?;
        let nowhere = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
        Ok(found.map(|client| client.addr.v4().unwrap_or(nowhere)))
    }

    /// Every mounted client by rid, as of the dirty state.
    ///
    /// # Errors
    /// If the items can not be read.
    pub async fn mounted(&self) -> Result<Vec<(u64, MountedClient)>> {
        let d = self.dirty().await;
        items::all_mounted(&self.cache, &d.sup.mounted_clients).await
    }
}

fn check_known(options: &VolumeOptions) -> Result<()> {
    match options.set_bits.get() & !VOLOPT_KNOWN_BITS {
        0 => Ok(()),
        _ => Err(ServerError::Refused(Errno::EINVAL)),
    }
}
