//! What a side has left on its devices, in a form in which two sides can be compared:
//! the metadata as `outrider print` tells them, without what chance and time decide, and
//! the bytes of every file's blocks where they lie.

use crate::model::Reply;
use crate::trace::digest;
use outrider_core::env::{AlignedBuf, BlockDevice, DeviceRole, Env};
use outrider_core::fs::api::FiemapExtent;
use outrider_core::volume::check::{CheckOptions, check};
use outrider_core::volume::print::{PrintOptions, Record, print};
use serde_json::Value;
use std::collections::BTreeMap;
use std::rc::Rc;

/// Bytes of a block of the data device.
const BLOCK: u64 = 4096;
/// Fields that chance, time or the address of the server decide: ids of blocks' versions,
/// checks over them, times, what of the quorum is at which address.
const LEFT_OUT: [&str; 12] = [
    "crc",
    "seq",
    "ts",
    "atime",
    "mtime",
    "ctime",
    "crtime",
    "quorum_slots",
    "write_nr",
    "term",
    "record_time",
    "item_hash",
];

/// What both devices hold.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Records of metadata, in order.
    pub records: Vec<String>,
    /// Digests of the blocks of files, by their place on the data device.
    pub blocks: BTreeMap<u64, u64>,
}

fn strip(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !LEFT_OUT.contains(&name.as_str()));
            fields.values_mut().for_each(strip);
        }
        Value::Array(all) => all.iter_mut().for_each(strip),
        _ => {}
    }
}

/// Reads the devices of a volume that is not mounted; `replies` say where files lie.
///
/// # Errors
/// What can not be read, or what `check` finds.
pub async fn left(env: &Env, replies: &[Reply]) -> Result<Left, String> {
    let open = |role| env.devices.open(role).map_err(|error| error.to_string());
    let (meta, data) = (open(DeviceRole::Meta)?, open(DeviceRole::Data)?);
    let options = CheckOptions {
        strict: true,
        ..CheckOptions::default()
    };
    let report = check(Rc::clone(&meta), Rc::clone(&data), &options).await;
    if report.errors > 0 {
        return Err(format!("check: {:?}", report.problems));
    }
    let mut left = Left::default();
    let mut write = |record: Record| {
        let mut value = serde_json::json!(record);
        strip(&mut value);
        left.records.push(value.to_string());
    };
    let printed = print(meta, PrintOptions::default(), &mut write).await;
    printed.map_err(|error| error.to_string())?;
    for reply in replies {
        if let Reply::Extents(extents) = reply {
            for extent in extents {
                read_extent(&*data, extent, &mut left.blocks).await?;
            }
        }
    }
    Ok(left)
}

async fn read_extent(
    data: &dyn BlockDevice,
    extent: &FiemapExtent,
    blocks: &mut BTreeMap<u64, u64>,
) -> Result<(), String> {
    for number in 0..extent.length / BLOCK {
        let at = extent.physical + number * BLOCK;
        if extent.physical == 0 || blocks.contains_key(&at) {
            continue;
        }
        let (buf, result) = data.read(at, AlignedBuf::zeroed(BLOCK as usize)).await;
        result.map_err(|error| error.to_string())?;
        blocks.insert(at, digest(&buf));
    }
    Ok(())
}
