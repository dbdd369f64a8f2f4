//! The test vectors of spec 01 (sections 2, 4, 11, 12, 14, 16), 04 section 19,
//! 08 section 14 and 09 section 16, as far as they concern encoding.

use super::*;
use zerocopy::{FromBytes, IntoBytes};

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .bytes()
        .filter(|b| !b.is_ascii_whitespace())
        .map(|b| (b as char).to_digit(16).expect("a hex digit") as u8)
        .collect();
    digits.chunks(2).map(|d| d[0] << 4 | d[1]).collect()
}

fn key_of(text: &str) -> Key {
    let n: Vec<u64> = text.split('.').map(|n| n.parse().unwrap()).collect();
    Key::new(n[0] as u8, n[1], n[2] as u8, n[3], n[4], n[5] as u8)
}

#[test]
fn crc_has_no_final_inversion() {
    assert_eq!(crc32c(b"123456789"), 0x1cf9_6d7c);
    assert_eq!(crc32c(b""), 0xffff_ffff);
    let mut leaf = vec![0; LG_BLOCK_SIZE];
    init_header(
        &mut leaf,
        Magic::Btree,
        0x1122_3344_5566_7788,
        5,
        0x0102_0304_0506_0708,
    );
    leaf[38..40].copy_from_slice(&62464u16.to_le_bytes());
    assert_eq!(block_crc(&leaf), 0x6712_cef4);
    let mut quorum = vec![0; SM_BLOCK_SIZE];
    init_header(&mut quorum, Magic::Quorum, 0x1122_3344_5566_7788, 17, 1);
    assert_eq!(block_crc(&quorum), 0x9d03_23ce);
}

#[test]
fn verify_names_the_first_difference() {
    let fsid = 7;
    let mut b = vec![0; LG_BLOCK_SIZE];
    init_header(&mut b, Magic::Bloom, fsid, 9, 3);
    seal(&mut b);
    let r = BlockRef::new(9, 3);
    assert_eq!(verify_ref(&b, Magic::Bloom, fsid, &r), Ok(()));
    assert!(matches!(
        verify_ref(&b, Magic::Btree, fsid, &r),
        Err(HeaderError::Magic { .. })
    ));
    assert!(matches!(
        verify_ref(&b, Magic::Bloom, 8, &r),
        Err(HeaderError::Fsid { .. })
    ));
    assert!(matches!(
        verify_ref(&b, Magic::Bloom, fsid, &BlockRef::new(8, 3)),
        Err(HeaderError::Blkno { .. })
    ));
    assert!(matches!(
        verify_ref(&b, Magic::Bloom, fsid, &BlockRef::new(9, 4)),
        Err(HeaderError::Seq { .. })
    ));
    b[60000] ^= 1;
    assert!(matches!(
        verify_ref(&b, Magic::Bloom, fsid, &r),
        Err(HeaderError::Crc { .. })
    ));
}

#[test]
fn keys_increment_and_decrement_with_carry() {
    let max = u64::MAX;
    let rows = [
        (
            Key::new(16, 5, 4, 7, 9, 0),
            "16.5.4.7.9.1",
            "16.5.4.7.8.255",
        ),
        (
            Key::new(16, 5, 4, 7, 9, 255),
            "16.5.4.7.10.0",
            "16.5.4.7.9.254",
        ),
        (
            Key::new(16, 5, 4, 7, max, 255),
            "16.5.4.8.0.0",
            "16.5.4.7.18446744073709551615.254",
        ),
        (
            Key::new(16, 5, 4, max, max, 255),
            "16.5.5.0.0.0",
            "16.5.4.18446744073709551615.18446744073709551615.254",
        ),
        (
            Key::new(16, 5, 255, max, max, 255),
            "16.6.0.0.0.0",
            "16.5.255.18446744073709551615.18446744073709551615.254",
        ),
        (
            Key::new(16, max, 255, max, max, 255),
            "17.0.0.0.0.0",
            "16.18446744073709551615.255.18446744073709551615.18446744073709551615.254",
        ),
    ];
    for (key, inc, dec) in rows {
        assert_eq!(key.inc().to_string(), inc);
        assert_eq!(key.dec().to_string(), dec);
        assert_eq!(key.inc().dec(), key);
    }
    assert_eq!(Key::ONES.inc(), Key::ZEROS);
    assert_eq!(Key::ZEROS.dec(), Key::ONES);
    assert_eq!(Key::ZEROS.inc().to_string(), "0.0.0.0.0.1");
    assert_eq!(Key::ONES.dec().fourth, 254);
}

#[test]
fn keys_compare_in_their_own_order() {
    let ascending = [
        "4.0.4.0.1.0",
        "4.0.8.0.1.0",
        "16.1.4.0.0.0",
        "16.1.12.5.2.0",
        "16.2.4.0.0.0",
        "36.0.0.0.0.0",
        "40.0.0.0.0.0",
    ];
    for pair in ascending.windows(2) {
        assert!(key_of(pair[0]) < key_of(pair[1]), "{pair:?}");
    }
    let r = |a: &str, b: &str| KeyRange::new(key_of(a), key_of(b));
    let (low, high) = (
        r("16.1.0.0.0.0", "16.2.0.0.0.0"),
        r("16.3.0.0.0.0", "16.4.0.0.0.0"),
    );
    assert!(low.compare(&high).is_lt() && high.compare(&low).is_gt());
    assert!(low.overlaps(&r("16.2.0.0.0.0", "16.9.0.0.0.0")));
    assert_eq!(low.intersect(&high), None);
}

#[test]
fn key_bytes_buckets_and_bloom_bits() {
    type Row = (Key, &'static str, u32, usize, u64, [u32; 3]);
    let rows: [Row; 8] = [
        (
            key_of("4.0.4.0.1.0"),
            "0000000000000000000000000000000001000000000000000004040000000000",
            0xf6d1_cdfc,
            252,
            0x1a93_9d52_aaed_aadc,
            [25628, 289_309, 155_317],
        ),
        (
            Key::inode(1),
            "0100000000000000000000000000000000000000000000000010040000000000",
            0x1aac_bf90,
            1040,
            0xe9f7_856b_100a_c9f0,
            [346_928, 197_249, 28757],
        ),
        (
            Key::dirent(1, 72_623_859_790_382_856, 2),
            "01000000000000000807060504030201020000000000000000100c0000000000",
            0x5fac_0162,
            618,
            0x987c_f648_dec9_0dc2,
            [254_466, 126_681, 152_281],
        ),
        (
            Key::xattr(1024, 3_735_928_559, 7, 3),
            "0004000000000000efbeadde0000000007000000000000000310080000000000",
            0x067f_8063,
            1011,
            0x7599_2de8_252f_0ec3,
            [319_043, 191_141, 437_559],
        ),
        (
            Key::free_extent_blkno(2_097_151, 2_097_088),
            "ffff1f0000000000c0ff1f000000000000000000000000000024000000000000",
            0x8b5f_7b4a,
            650,
            0xd4d3_31cd_df14_b32a,
            [496_298, 112_418, 250_183],
        ),
        (
            Key::free_extent_order(2_097_151, 2_097_088),
            "f9ffffffffffffffffff1f0000000000c0ff1f00000000000028000000000000",
            0x6173_eaf0,
            656,
            0xcfb1_2ec4_4a9f_f850,
            [238_224, 422_675, 476_539],
        ),
        (
            Key::ZEROS,
            "0000000000000000000000000000000000000000000000000000000000000000",
            0x0b2a_e445,
            845,
            0x0c82_1078_4d8a_f5a5,
            [463_909, 89457, 135_105],
        ),
        (
            Key::ONES,
            "ffffffffffffffffffffffffffffffffffffffffffffffffffffff0000000000",
            0x3e16_27b4,
            1380,
            0x6a26_c4cb_1c88_6874,
            [318_900, 213_073, 56659],
        ),
    ];
    for (key, stored, h32, bucket, h64, bits) in rows {
        let bytes = key.to_bytes();
        assert_eq!(bytes.to_vec(), hex(stored), "{key}");
        assert_eq!(DiskKey::from(key).as_bytes(), bytes);
        assert_eq!(Key::from_bytes(&bytes), key);
        assert_eq!(Key::from(DiskKey::from(key)), key);
        assert_eq!(fnv1a32(&bytes), h32, "{key}");
        assert_eq!(leaf_bucket(&key), bucket, "{key}");
        assert_eq!(fnv1a64(&bytes), h64, "{key}");
        assert_eq!(bloom_bits(&key), bits, "{key}");
    }
}

#[test]
fn bloom_bits_of_lock_start_keys() {
    let rows = [
        (
            "16.0.0.0.0.0",
            0xb75a_57d3_304d_c7f5,
            [349_301, 400_905, 383_775],
        ),
        (
            "16.1024.0.0.0.0",
            0xe68c_e6e8_0505_7c09,
            [410_633, 362_016, 181_083],
        ),
        (
            "16.123904.0.0.0.0",
            0xf9dd_c702_f206_c4f0,
            [301_872, 345_344, 4956],
        ),
        (
            "12.0.0.0.0.0",
            0xcca4_45fc_779d_1361,
            [509_345, 323_443, 200_855],
        ),
        (
            "14.0.0.0.0.0",
            0x41ff_4ee7_d3f5_6dab,
            [430_123, 100_990, 9851],
        ),
        (
            "10.0.0.0.0.0",
            0x5749_3d11_1b44_b917,
            [64599, 21928, 350_900],
        ),
        (
            "8.0.4.0.0.0",
            0x6f94_a35a_0725_45e9,
            [418_537, 160_996, 431_949],
        ),
        (
            "4.0.4.0.0.0",
            0x6991_b31a_be02_c31d,
            [30749, 251_904, 427_980],
        ),
        (
            "4.0.4.1024.0.0",
            0xcb60_9231_1f02_e1c1,
            [506_305, 65312, 393_352],
        ),
        (
            "4.0.8.1024.0.0",
            0x5907_0165_673b_c8dd,
            [257_053, 505_895, 283_397],
        ),
    ];
    for (key, h64, bits) in rows {
        let key = key_of(key);
        assert_eq!(fnv1a64(&key.to_bytes()), h64, "{key}");
        assert_eq!(bloom_bits(&key), bits, "{key}");
    }
}

#[test]
fn name_hashes() {
    let long = [b'a'; 255];
    let all: Vec<u8> = (1..=255).collect();
    let rows: [(&[u8], u32, u32, u32); 13] = [
        (b"a", 0xe40c_292c, 0x3e2f_bccf, 0x6100_0000),
        (b"file", 0xaaea_5743, 0xb35a_3a4c, 0x6669_6c65),
        (b"abcd", 0xce34_79bd, 0x6d37_f5ce, 0x6162_6364),
        (b"abcde", 0x749b_cf08, 0x3baf_2968, 0x6162_6364),
        (b"abcdefgh", 0x76da_aa8d, 0xf56b_de48, 0x4554_4556),
        (b"hello world", 0xd58b_3fa7, 0x366b_9a55, 0x6466_7457),
        (
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
            0x8a88_dd82,
            0xce67_6832,
            0x0066_2044,
        ),
        (b"user.test", 0x9c06_3810, 0xf217_78d1, 0x4545_7445),
        (
            b"scoutfs.hide.srch.name",
            0xc863_90d1,
            0x5139_90e9,
            0x3d7c_7f2e,
        ),
        ("\u{e9}".as_bytes(), 0x1e9d_e8c1, 0xe454_7223, 0xc3a9_0000),
        (&long, 0xd2fd_a126, 0x0f5f_dc21, 0x4343_4343),
        (&all, 0x6622_da47, 0xce0c_4cbd, 0x027b_3adb),
        (b"", 0x811c_9dc5, 0xffff_ffff, 0),
    ];
    for (name, h32, crc, print) in rows {
        assert_eq!(fnv1a32(name), h32);
        assert_eq!(xattr_hash(name), crc);
        assert_eq!(name_fingerprint(name), print);
        assert_eq!(dirent_hash(name), u64::from(print) << 32 | u64::from(h32));
    }
    let rows: [(&[u8], u64); 5] = [
        (b"", 0xcbf2_9ce4_8422_2325),
        (b"a", 0xaf63_dc4c_8601_ec8c),
        (b"file", 0xaad0_1178_f02a_6a23),
        (b"scoutfs.hide.srch.name", 0x1743_d99a_85bb_a731),
        (&all, 0x85a3_1012_d208_17c7),
    ];
    for (name, h64) in rows {
        assert_eq!(fnv1a64(name), h64);
    }
}

#[test]
fn orders_of_free_extents() {
    let rows = [
        (1, 0),
        (7, 0),
        (8, 1),
        (63, 1),
        (64, 2),
        (511, 2),
        (512, 3),
        (4096, 4),
        (32768, 5),
        (2_097_088, 6),
        (1 << 52, 17),
    ];
    for (len, order) in rows {
        assert_eq!(free_extent_order(len), order, "length {len}");
        assert_eq!(Key::free_extent_order(9, len).first, u64::MAX - order);
    }
}

#[test]
fn indx_keys_pack_a_big_number() {
    let key = Key::xattr_indx(
        0xab,
        0x1122_3344_5566_7788,
        0x99aa_bbcc_ddee_ff00,
        0x0123_4567_89ab_cdef,
    );
    assert_eq!(key.first, 0xab11_2233_4455_6677);
    assert_eq!(key.second, 0x8899_aabb_ccdd_eeff);
    assert_eq!(key.third, 0x0001_2345_6789_abcd);
    assert_eq!(key.fourth, 0xef);
    assert_eq!(
        key.xattr_indx_fields(),
        (
            0xab,
            0x1122_3344_5566_7788,
            0x99aa_bbcc_ddee_ff00,
            0x0123_4567_89ab_cdef
        )
    );
}

#[test]
fn quota_rule_hash() {
    let rule = QuotaRuleVal {
        name_val: [1.into(), 2.into(), 3.into()],
        limit: 1000.into(),
        prio: 1,
        op: QUOTA_OP_DATA,
        rule_flags: 0,
        name_source: [0, 1, 2],
        name_flags: [0, 1, 0],
        pad: [0; 7],
    };
    let bytes = hex(
        "010000000000000002000000000000000300000000000000e8030000000000000101000001020001000000\
         0000000000",
    );
    assert_eq!(rule.as_bytes(), bytes);
    assert_eq!(fnv1a64(&bytes), 0x1ccc_0fa3_10b6_e8b6);
}

#[test]
fn inode_lengths_follow_the_format_version() {
    let inode = Inode {
        proj: 7.into(),
        ..Inode::default()
    };
    assert_eq!(inode.to_value(1).len(), INODE_V1_SIZE);
    assert_eq!(inode.to_value(2).len(), INODE_V2_SIZE);
    assert_eq!(Inode::from_value(inode.to_value(2), 2), Ok(inode));
    assert_eq!(
        Inode::from_value(inode.to_value(1), 2),
        Ok(Inode::default())
    );
    assert!(Inode::from_value(inode.to_value(2), 1).is_err());
    assert!(Inode::from_value(&inode.as_bytes()[..161], 2).is_err());
}

#[test]
fn dirent_values_hold_a_name() {
    let head = Dirent {
        ino: 9.into(),
        kind: DT_REG,
        ..Dirent::default()
    };
    let value = head.to_value(b"x");
    assert_eq!(value.len(), 33);
    assert_eq!(Dirent::from_value(&value), Ok((head, &b"x"[..])));
    assert!(Dirent::from_value(&value[..32]).is_err());
    assert!(Dirent::from_value(&head.to_value(&[b'n'; 256])).is_err());
}

#[test]
fn greeting_and_lock_bytes() {
    let fsid = 0x1122_3344_5566_7788;
    let rid = 0xa1b2_c3d4_e5f6_0718;
    let hdr = NetHeader {
        seq: 1.into(),
        id: 1.into(),
        data_len: 40.into(),
        cmd: NetCmd::Greeting as u8,
        ..NetHeader::default()
    };
    let greeting = NetGreeting {
        fsid: fsid.into(),
        fmt_vers: 2.into(),
        server_term: 0.into(),
        rid: rid.into(),
        flags: NET_GREETING_FLAG_QUORUM.into(),
    };
    assert_eq!(
        [hdr.as_bytes(), greeting.as_bytes()].concat(),
        hex(
            "01000000000000000000000000000000 01000000000000002800000000000000
             88776655443322110200000000000000 00000000000000001807f6e5d4c3b2a1
             0200000000000000"
        )
    );
    let hdr = NetHeader {
        seq: 3.into(),
        recv_seq: 3.into(),
        id: 3.into(),
        data_len: 48.into(),
        cmd: NetCmd::Lock as u8,
        flags: NET_FLAG_RESPONSE,
        ..NetHeader::default()
    };
    let grant = NetLock {
        key: Key::new(ZONE_FS, 4096, 0, 0, 0, 0).into(),
        write_seq: 0x1001.into(),
        old_mode: 0,
        new_mode: 2,
        pad: [0; 6],
    };
    assert_eq!(
        [hdr.as_bytes(), grant.as_bytes()].concat(),
        hex(
            "03000000000000000300000000000000 03000000000000003000070100000000
             00100000000000000000000000000000 00000000000000000010000000000000
             01100000000000000002000000000000"
        )
    );
}

#[test]
fn quorum_message_bytes() {
    let rows = [
        (QUORUM_MSG_REQUEST_VOTE, 0, "bc71c04b"),
        (QUORUM_MSG_VOTE, 2, "0989ead9"),
        (QUORUM_MSG_HEARTBEAT, 0, "3d52a7f4"),
        (QUORUM_MSG_RESIGNATION, 0, "85f8e229"),
    ];
    for (kind, from, crc) in rows {
        let mut msg = QuorumMessage {
            fsid: 0x1122_3344_5566_7788.into(),
            term: 7.into(),
            kind,
            from,
            ..QuorumMessage::default()
        };
        assert!(!msg.crc_ok());
        msg.seal();
        assert!(msg.crc_ok());
        assert_eq!(msg.as_bytes()[28..], hex(crc));
        assert_eq!(QuorumMessage::read_from_bytes(msg.as_bytes()).unwrap(), msg);
    }
}

#[test]
fn quorum_block_bytes() {
    let rid = 0xa1b2_c3d4_e5f6_0718;
    let mut q = QuorumBlock {
        write_nr: 4.into(),
        ..QuorumBlock::default()
    };
    let times = [
        (1000, 0),
        (1010, 250_000_000),
        (1010, 300_000_000),
        (1012, 0),
    ];
    let terms = [6, 7, 7, 7];
    for i in 0..4 {
        q.events[i] = QuorumEvent {
            write_nr: (i as u64 + 1).into(),
            rid: rid.into(),
            term: terms[i].into(),
            ts: Timespec::new(times[i].0, times[i].1),
        };
    }
    let mut block = vec![0; SM_BLOCK_SIZE];
    block[..280].copy_from_slice(q.as_bytes());
    init_header(&mut block, Magic::Quorum, 0x1122_3344_5566_7788, 17, 1);
    seal(&mut block);
    assert_eq!(
        block[..0x40],
        hex(
            "9b70a71f680831bc8877665544332211 01000000000000001100000000000000
             04000000000000000100000000000000 1807f6e5d4c3b2a10600000000000000"
        )
    );
    assert!(q.may_be_running());
}

#[test]
fn mounted_client_bytes() {
    let rid = 0xa1b2_c3d4_e5f6_0718;
    assert_eq!(
        Key::mounted_client(rid).to_bytes().to_vec(),
        hex("1807f6e5d4c3b2a10000000000000000 0000000000000000001c000000000000")
    );
    let value = MountedClient {
        addr: InetAddr::from_v4("10.0.0.3:51234".parse().unwrap()),
        flags: MOUNTED_CLIENT_FLAG_QUORUM,
        pad: [0; 7],
    };
    assert_eq!(
        value.as_bytes(),
        hex(
            "010022c80300000a0000000000000000 00000000000000000000000000000000
             0100000000000000"
        )
    );
    assert_eq!(value.addr.v4().unwrap().to_string(), "10.0.0.3:51234");
    let mut undefined = value.addr;
    undefined.rest = [0xee; 24];
    assert!(undefined.same(&value.addr));
}

#[test]
fn every_command_and_magic_has_its_number() {
    for n in 0..=19 {
        assert_eq!(NetCmd::from_value(n).expect("a command") as u8, n);
    }
    assert_eq!(NetCmd::from_value(20), None);
    for m in [
        Magic::Super,
        Magic::Quorum,
        Magic::Btree,
        Magic::Bloom,
        Magic::SrchBlock,
        Magic::SrchParent,
        Magic::AllocList,
    ] {
        assert_eq!(Magic::from_value(m.value()), Some(m));
    }
    assert_eq!(Magic::from_value(0), None);
}
