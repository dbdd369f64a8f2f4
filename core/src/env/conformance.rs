//! Conformance tests of the seams: one body, run over every backend (simulated
//! and real devices). They check what the contract promises while nothing
//! crashes; what survives a crash is the simulator's business.

use super::{
    ALIGN, AlignedBuf, BlockDevice, DeviceError, DeviceRole, Devices, Entropy, IoBuf, WriteFlags,
};
use std::rc::Rc;
use std::sync::Arc;

fn pattern(len: usize, seed: u64) -> IoBuf {
    let mut buf = AlignedBuf::zeroed(len);
    for (nr, byte) in buf.iter_mut().enumerate() {
        *byte = (seed
            .wrapping_mul(31)
            .wrapping_add(nr as u64 * 7 + nr as u64 / 4096)) as u8;
    }
    Arc::new(buf)
}

async fn read(device: &dyn BlockDevice, offset: u64, len: usize) -> AlignedBuf {
    let (buf, result) = device.read(offset, AlignedBuf::zeroed(len)).await;
    result.expect("a read inside the device");
    buf
}

/// Checks a device of at least 4 MiB, whose contents it overwrites.
///
/// # Panics
/// If the device breaks its contract.
pub async fn check_device(device: Rc<dyn BlockDevice>, entropy: &dyn Entropy) {
    assert!(device.size() >= 4 << 20, "the test needs 4 MiB");
    assert!(device.size().is_multiple_of(ALIGN as u64));
    reads_what_was_written(&*device).await;
    many_at_once(&device, entropy).await;
    refuses_what_lies_outside(&*device).await;
    survives_dropped_requests(&*device).await;
}

/// Checks that both devices of a volume, of at least 1 MiB each, can be opened again and
/// again, that all who open one see the same, and that they are two. Overwrites their
/// last block.
///
/// # Panics
/// If they break their contract.
pub async fn check_devices(devices: &dyn Devices) {
    let roles = [DeviceRole::Meta, DeviceRole::Data];
    let open = |role| devices.open(role).expect("a device of the volume");
    for (number, role) in roles.into_iter().enumerate() {
        let (one, other) = (open(role), open(role));
        assert_eq!(one.size(), other.size());
        let at = one.size() - 4096;
        let buf = pattern(4096, 70 + number as u64);
        one.write(at, vec![Arc::clone(&buf)], WriteFlags::default())
            .await
            .expect("a write");
        // What has completed is seen by everybody at once, flushed or not.
        assert_eq!(read(&*other, at, 4096).await[..], buf[..]);
        other.flush().await.expect("a flush by another one");
        drop(one);
        assert_eq!(read(&*other, at, 4096).await[..], buf[..]);
    }
    for (number, role) in roles.into_iter().enumerate() {
        let device = open(role);
        let got = read(&*device, device.size() - 4096, 4096).await;
        assert_eq!(got[..], pattern(4096, 70 + number as u64)[..]);
    }
}

async fn reads_what_was_written(device: &dyn BlockDevice) {
    let (a, b, c) = (pattern(4096, 1), pattern(65536, 2), pattern(8192, 3));
    let bufs = vec![Arc::clone(&a), Arc::clone(&b), Arc::clone(&c)];
    device
        .write(8192, bufs, WriteFlags::default())
        .await
        .expect("a vectored write");
    assert_eq!(read(device, 8192, 4096).await[..], a[..]);
    assert_eq!(read(device, 12288, 65536).await[..], b[..]);
    assert_eq!(read(device, 12288 + 65536, 8192).await[..], c[..]);
    let fua = pattern(4096, 4);
    device
        .write(12288, vec![Arc::clone(&fua)], WriteFlags { fua: true })
        .await
        .expect("a durable write");
    device.flush().await.expect("a flush");
    assert_eq!(read(device, 12288, 4096).await[..], fua[..]);
    assert_eq!(read(device, 16384, 4096).await[..], b[4096..8192]);
    // More buffers than one system call takes.
    let many: Vec<IoBuf> = (0..1030).map(|n| pattern(4096, n)).collect();
    if device.size() >= 8 << 20 {
        device
            .write(0, many.clone(), WriteFlags::default())
            .await
            .expect("a write of many buffers");
        for nr in [0usize, 1, 1023, 1024, 1029] {
            let got = read(device, nr as u64 * 4096, 4096).await;
            assert_eq!(got[..], many[nr][..], "buffer {nr}");
        }
    }
}

async fn many_at_once(device: &Rc<dyn BlockDevice>, entropy: &dyn Entropy) {
    let base = entropy.next_u64();
    let mut writes: Vec<_> = (0..256u64)
        .map(|nr| {
            let buf = pattern(4096, base.wrapping_add(nr));
            Some(device.write(nr * 8192, vec![buf], WriteFlags::default()))
        })
        .collect();
    // All are started before any is waited for.
    std::future::poll_fn(|cx| {
        for slot in &mut writes {
            if let Some(write) = slot
                && let std::task::Poll::Ready(result) = write.as_mut().poll(cx)
            {
                result.expect("one of many writes");
                *slot = None;
            }
        }
        match writes.iter().all(Option::is_none) {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
    device.flush().await.expect("a flush");
    for nr in 0..256u64 {
        let want = pattern(4096, base.wrapping_add(nr));
        assert_eq!(read(&**device, nr * 8192, 4096).await[..], want[..]);
    }
}

async fn refuses_what_lies_outside(device: &dyn BlockDevice) {
    let size = device.size();
    let (buf, result) = device.read(size, AlignedBuf::zeroed(4096)).await;
    assert_eq!(buf.len(), 4096, "the buffer comes back");
    assert!(matches!(result, Err(DeviceError::OutOfRange { .. })));
    let wide = vec![pattern(8192, 0)];
    let result = device.write(size - 4096, wide, WriteFlags::default()).await;
    assert!(matches!(result, Err(DeviceError::OutOfRange { .. })));
    device
        .write(size - 4096, vec![pattern(4096, 9)], WriteFlags::default())
        .await
        .expect("a write of the last block");
    assert_eq!(
        read(device, size - 4096, 4096).await[..],
        pattern(4096, 9)[..]
    );
}

async fn survives_dropped_requests(device: &dyn BlockDevice) {
    for nr in 0..64u64 {
        let mut dropped = device.read(nr * 4096, AlignedBuf::zeroed(4096));
        // Started by a first poll, then forgotten.
        std::future::poll_fn(|cx| {
            let _ = dropped.as_mut().poll(cx);
            std::task::Poll::Ready(())
        })
        .await;
        drop(dropped);
        drop(device.write(0, vec![pattern(4096, nr)], WriteFlags::default()));
    }
    device.flush().await.expect("a flush");
    read(device, 0, 65536).await;
}
