//! Which cluster key a volume has: the key's id, in a small block of the metadata
//! device that the original neither reads nor writes (it uses nothing of the first
//! 64 KiB).
//!
//! ```text
//! small block 15:  0 "OUTRKEY1" | 8 fsid u64 | 16 key id [16] | 32 crc32c u32 of 0..32
//! ```
//!
//! Nothing secret is in it. It is there so that a mount with another key, or none,
//! fails with the reason before it binds a port, votes, or has anybody fenced. A
//! block of anything else, or of another volume, means that there is no key.
//!
//! What can go wrong: a record that was damaged. It is refused, not taken for none.

use super::VolumeError;
use crate::env::{AlignedBuf, BlockDevice, DeviceRole, IoBuf, WriteFlags};
use crate::format::{QUORUM_MAX_SLOTS, SM_BLOCK_SIZE, SUPER_BLKNO, crc32c};
use crate::secure::{ClusterKey, KeyId};

/// Small block of the metadata device.
pub const KEY_RECORD_BLKNO: u64 = SUPER_BLKNO - 1;
const MAGIC: &[u8; 8] = b"OUTRKEY1";
const LEN: usize = 36;
const _: () = assert!(
    QUORUM_MAX_SLOTS == 15,
    "the record lies below the super block"
);

fn device(source: crate::env::DeviceError) -> VolumeError {
    VolumeError::Device {
        role: DeviceRole::Meta,
        source,
    }
}

/// The record's block.
fn encode(fsid: u64, key: Option<KeyId>) -> AlignedBuf {
    let mut block = AlignedBuf::zeroed(SM_BLOCK_SIZE);
    if let Some(id) = key {
        block[..8].copy_from_slice(MAGIC);
        block[8..16].copy_from_slice(&fsid.to_le_bytes());
        block[16..32].copy_from_slice(&id.0);
        let crc = crc32c(&block[..32]);
        block[32..LEN].copy_from_slice(&crc.to_le_bytes());
    }
    block
}

fn decode(block: &[u8], fsid: u64) -> Result<Option<KeyId>, VolumeError> {
    if block[..8] != *MAGIC || block[8..16] != fsid.to_le_bytes() {
        return Ok(None);
    }
    if block[32..LEN] != crc32c(&block[..32]).to_le_bytes() {
        return Err(VolumeError::KeyRecord);
    }
    let id = block[16..32].try_into().expect("sixteen bytes");
    Ok(Some(KeyId(id)))
}

/// Id of the volume's cluster key; `None` if it has none.
///
/// # Errors
/// A device that fails, or a damaged record.
pub async fn read_key_record(
    meta: &dyn BlockDevice,
    fsid: u64,
) -> Result<Option<KeyId>, VolumeError> {
    let buf = AlignedBuf::zeroed(SM_BLOCK_SIZE);
    let (block, done) = meta
        .read(KEY_RECORD_BLKNO * SM_BLOCK_SIZE as u64, buf)
        .await;
    done.map_err(device)?;
    decode(&block, fsid)
}

/// Gives the volume a key, another key, or none, durably.
///
/// # Errors
/// If the device fails.
pub async fn write_key_record(
    meta: &dyn BlockDevice,
    fsid: u64,
    key: Option<KeyId>,
) -> Result<(), VolumeError> {
    let block = vec![IoBuf::from(encode(fsid, key))];
    let at = KEY_RECORD_BLKNO * SM_BLOCK_SIZE as u64;
    let flags = WriteFlags { fua: true };
    meta.write(at, block, flags).await.map_err(device)
}

/// Checks that a mount has the volume's key, or that neither has one.
///
/// # Errors
/// [`VolumeError::Key`] naming both, and what to do.
pub async fn check_key(
    meta: &dyn BlockDevice,
    fsid: u64,
    key: Option<&ClusterKey>,
) -> Result<(), VolumeError> {
    let volume = read_key_record(meta, fsid).await?;
    let given = key.map(ClusterKey::id);
    if volume == given {
        return Ok(());
    }
    Err(VolumeError::Key { volume, given })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::testing::{MemDevice, block_on};

    #[test]
    fn a_mount_without_the_volumes_key_is_told_why() {
        let meta = MemDevice::new(1 << 20);
        let (one, two) = (
            ClusterKey::from_bytes(&[1; 32]),
            ClusterKey::from_bytes(&[2; 32]),
        );
        let check = |key: Option<&ClusterKey>| {
            block_on(check_key(&meta, 7, key)).map_err(|error| error.to_string())
        };
        assert_eq!(check(None), Ok(()));
        assert!(
            check(Some(&one))
                .unwrap_err()
                .contains("has no cluster key")
        );
        block_on(write_key_record(&meta, 7, Some(one.id()))).unwrap();
        assert_eq!(check(Some(&one)), Ok(()));
        assert!(check(None).unwrap_err().contains(&one.id().to_string()));
        let other = check(Some(&two)).unwrap_err();
        assert!(other.contains(&one.id().to_string()), "{other}");
        assert!(other.contains(&two.id().to_string()), "{other}");
        // A volume made over this one has none.
        assert_eq!(block_on(read_key_record(&meta, 8)).unwrap(), None);
        let mut block = meta.peek(KEY_RECORD_BLKNO * 4096, 4096);
        block[20] ^= 1;
        meta.poke(KEY_RECORD_BLKNO * 4096, &block);
        assert!(matches!(
            block_on(read_key_record(&meta, 7)),
            Err(VolumeError::KeyRecord)
        ));
        block_on(write_key_record(&meta, 7, None)).unwrap();
        assert_eq!(check(None), Ok(()));
    }
}
