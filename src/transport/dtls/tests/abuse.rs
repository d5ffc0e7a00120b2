//! What a stranger, or the device itself, may send to a session without effect.

use proptest::prelude::*;

use super::*;

/// A record in the clear, or one that pretends to be encrypted.
fn record(kind: u8, epoch: u8, number: u8, body: &[u8]) -> Vec<u8> {
    let mut record = vec![kind, 0xfe, 0xfd, 0, epoch, 0, 0, 0, 0, 0, number];
    record.extend((body.len() as u16).to_be_bytes());
    record.extend(body);
    record
}

/// Records that do nobody good, of every kind, epoch and some lengths.
fn spoofed() -> Vec<Vec<u8>> {
    let mut records = Vec::new();
    for kind in [0, 19, 20, 21, 22, 23, 24, 25, 255] {
        for epoch in 0..4 {
            for number in [0, 1, 2, 200] {
                for body in [&[][..], &[1], &[2, 40], &[1, 0], &[0; 30], &[0xff; 300]] {
                    records.push(record(kind, epoch, number, body));
                }
            }
        }
    }
    // Every length around what ciphers add to no data.
    for length in 0..200 {
        for kind in [21, 22, 23] {
            records.push(record(kind, 1, 77, &vec![0x5a; length]));
        }
    }
    records
}

#[test]
fn nobody_but_the_device_ends_a_session() {
    for cipher in [
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "PSK-AES128-CCM",
        "PSK-AES128-CCM8",
    ] {
        let (mut device, mut session) = established(&context(), Device::with(cipher));
        let recorded = device.message(b"once");
        session.receive(&recorded);
        assert_eq!(read(&mut session).unwrap(), b"once");
        let replayed = [&recorded[..]].into_iter();
        let spoofed = spoofed();
        for datagram in replayed.chain(spoofed.iter().map(Vec::as_slice)) {
            session.receive(datagram);
            assert_eq!(read(&mut session), None, "{cipher}: {datagram:?}");
            assert_eq!(session.next_datagram(), None, "{cipher}: {datagram:?}");
        }
        assert_alive(&mut device, &mut session);
        // A good record behind a bad one, and one that was changed on its way.
        let mut packed = record(21, 0, 9, &[2, 40]);
        packed.extend(device.message(b"behind"));
        session.receive(&packed);
        assert_eq!(read(&mut session).unwrap(), b"behind");
        let mut changed = device.message(b"changed").to_vec();
        *changed.last_mut().unwrap() ^= 1;
        session.receive(&changed);
        assert_eq!(read(&mut session), None);
        assert_alive(&mut device, &mut session);
    }
}

#[test]
fn a_flood_of_bad_records_is_not_kept() {
    let (mut device, mut session) = established(&context(), Device::new());
    for number in 0..100_000_u32 {
        let mut datagram = record(23, 1, 0, &[0x5a; 40]);
        datagram[7..11].copy_from_slice(&number.to_be_bytes());
        session.receive(&datagram);
        assert_eq!(read(&mut session), None);
    }
    // Not read in between: as much as a socket would keep, the rest is lost.
    for _ in 0..100_000 {
        session.receive(&record(23, 1, 7, &[0x5a; 40]));
    }
    assert_eq!(read(&mut session), None);
    assert_alive(&mut device, &mut session);
}

/// In the clear a stranger at the device's address can do harm, but not with what no
/// handshake has.
#[test]
fn strange_records_do_not_disturb_a_handshake() {
    let now = Instant::now();
    let mut gate = Gate::new(context(), now).unwrap();
    let mut device = Device::new();
    let hello = device.hello(&mut gate, now, address(1));
    let Offer::Accepted(mut session) = gate.offer(now, address(1), &hello) else {
        panic!("not accepted");
    };
    for _ in 0..2_000 {
        session.receive(&record(23, 0, 9, b"data in the clear"));
        session.receive(&record(23, 1, 9, &[0x5a; 40]));
        session.receive(&record(22, 2, 9, &[0x5a; 40]));
        session.receive(b"garbage");
    }
    while let Some(datagram) = session.next_datagram() {
        device.receive(&datagram);
    }
    device.go_on();
    while let Some(datagram) = device.next_datagram() {
        session.receive(&datagram);
    }
    while let Some(datagram) = session.next_datagram() {
        device.receive(&datagram);
    }
    assert!(device.go_on());
    assert_alive(&mut device, &mut session);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_datagrams_hurt_a_session(
        datagrams in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..200),
                (20_u8..26, 0_u8..3, any::<u8>(), prop::collection::vec(any::<u8>(), 0..80))
                    .prop_map(|(kind, epoch, number, body)| record(kind, epoch, number, &body)),
            ],
            1..200,
        ),
    ) {
        thread_local! {
            static CONTEXT: Context = context();
        }
        let context = CONTEXT.with(Clone::clone);
        let (mut device, mut session) = established(&context, Device::with("PSK-AES128-CCM8"));
        for datagram in &datagrams {
            session.receive(datagram);
            prop_assert_eq!(read(&mut session), None);
        }
        assert_alive(&mut device, &mut session);
    }

    /// It may end, in the clear nothing is safe; but it does so in good order.
    #[test]
    fn no_datagrams_hurt_more_than_a_handshake(
        datagrams in prop::collection::vec(
            prop_oneof![
                prop::collection::vec(any::<u8>(), 0..200),
                (20_u8..24, 0_u8..2, any::<u8>(), prop::collection::vec(any::<u8>(), 0..80))
                    .prop_map(|(kind, epoch, number, body)| record(kind, epoch, number, &body)),
                // Messages of a handshake: type, length, number, fragment.
                (0_u8..25, any::<u8>(), 0_u8..12, any::<u8>(), 0_u8..60)
                    .prop_map(|(kind, length, number, start, count)| {
                        let header = [kind, 0, 0, length, 0, number, 0, 0, start, 0, 0, count];
                        let mut body = header.to_vec();
                        body.extend(vec![0x5a; count.into()]);
                        record(22, 0, number, &body)
                    }),
            ],
            1..100,
        ),
    ) {
        thread_local! {
            static CONTEXT: Context = context();
        }
        let now = Instant::now();
        let mut gate = Gate::new(CONTEXT.with(Clone::clone), now).unwrap();
        let hello = Device::new().hello(&mut gate, now, address(1));
        let Offer::Accepted(mut session) = gate.offer(now, address(1), &hello) else {
            panic!("not accepted");
        };
        for datagram in &datagrams {
            session.receive(datagram);
            prop_assert!(!session.is_established());
            prop_assert!(!matches!(session.read(&mut [0; 9]), Read::Data(_)));
            while session.next_datagram().is_some() {}
        }
        session.close();
        prop_assert_eq!(session.next_datagram(), None);
    }
}
