//! The simulated devices: what they keep, what they tear, what they refuse.

use super::*;
use crate::backend::tests::simulate;
use std::sync::Arc;

fn buf(byte: u8, len: usize) -> IoBuf {
    let mut buf = AlignedBuf::zeroed(len);
    buf.fill(byte);
    Arc::new(buf)
}

async fn byte(device: &Rc<dyn BlockDevice>, sector: u64) -> u8 {
    let (buf, result) = device.read(sector * 4096, AlignedBuf::zeroed(4096)).await;
    result.unwrap();
    assert!(buf.iter().all(|b| *b == buf[0]), "torn inside a sector");
    buf[0]
}

#[test]
fn what_was_written_reads_back_and_the_end_is_guarded() {
    simulate(1, async |host: Host| {
        let device = host.disks.open(&host, DeviceRole::Meta);
        assert_eq!(device.size(), 1 << 20);
        let bufs = vec![buf(1, 8192), buf(2, 4096)];
        device
            .write(4096, bufs, WriteFlags::default())
            .await
            .unwrap();
        let mut bytes = Vec::new();
        for sector in 0..5 {
            bytes.push(byte(&device, sector).await);
        }
        assert_eq!(bytes, [0, 1, 1, 2, 0]);
        let past = device
            .write((1 << 20) - 4096, vec![buf(1, 8192)], WriteFlags::default())
            .await;
        assert!(matches!(past, Err(DeviceError::OutOfRange { .. })));
        let (_, past) = device.read(1 << 20, AlignedBuf::zeroed(4096)).await;
        assert!(matches!(past, Err(DeviceError::OutOfRange { .. })));
    });
}

#[test]
fn a_crash_tears_writes_in_flight_and_a_flush_holds() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..60 {
        let bytes = simulate(seed, async |host: Host| {
            let device = host.disks.open(&host, DeviceRole::Data);
            device
                .write(0, vec![buf(1, 4096)], WriteFlags::default())
                .await
                .unwrap();
            device.flush().await.unwrap();
            let pending = device.write(4096, vec![buf(2, 8192)], WriteFlags::default());
            drop(pending);
            host.disks.crash(Some(Survival::Sectors));
            let mut bytes = Vec::new();
            for sector in 0..3 {
                bytes.push(byte(&device, sector).await);
            }
            bytes
        });
        assert_eq!(bytes[0], 1, "flushed data survives");
        seen.insert((bytes[1], bytes[2]));
    }
    assert_eq!(seen.len(), 4, "all ways to tear: {seen:?}");
}

#[test]
fn errors_and_stalls_come_and_go() {
    simulate(5, async |host: Host| {
        let device = host.disks.open(&host, DeviceRole::Meta);
        host.disks.add_fault(DiskFault::Error {
            device: crate::plan::Device::Meta,
            op: DiskOp::Write,
            from: 0,
            until: u64::MAX,
            times: 1,
            permille: 1000,
        });
        let write = || device.write(0, vec![buf(1, 4096)], WriteFlags::default());
        assert!(matches!(write().await, Err(DeviceError::Io { .. })));
        write().await.unwrap();
        let until = host.sim.now() + 50_000_000;
        host.disks.add_fault(DiskFault::Stall {
            device: crate::plan::Device::Meta,
            from: 0,
            until,
        });
        write().await.unwrap();
        assert!(host.sim.now() >= until);
    });
}

#[test]
fn requests_in_flight_of_a_barred_machine_end_with_an_error() {
    simulate(7, async |host: Host| {
        let device = host.disks.open(&host, DeviceRole::Meta);
        let write = device.write(0, vec![buf(1, 4096)], WriteFlags::default());
        let read = device.read(0, AlignedBuf::zeroed(4096));
        let flush = device.flush();
        host.disks.bar(host.node.id);
        assert!(matches!(write.await, Err(DeviceError::Io { .. })));
        assert!(matches!(read.await.1, Err(DeviceError::Io { .. })));
        assert!(matches!(flush.await, Err(DeviceError::Io { .. })));
        let later = device.read(0, AlignedBuf::zeroed(4096)).await;
        assert!(matches!(later.1, Err(DeviceError::Io { .. })));
        host.disks.admit(host.node.id);
        assert!([0, 1].contains(&byte(&device, 0).await));
    });
}

#[test]
fn the_trap_fires_at_the_request_it_was_set_for() {
    simulate(6, async |host: Host| {
        let device = host.disks.open(&host, DeviceRole::Meta);
        let fired = Rc::new(Cell::new(false));
        let tell = Rc::clone(&fired);
        host.disks.set_trap(2, move || tell.set(true));
        device.flush().await.unwrap();
        assert!(!fired.get());
        let _write = device.write(0, vec![buf(1, 4096)], WriteFlags::default());
        assert!(fired.get());
    });
}
