//! Messages of an established session.

use super::*;

#[test]
fn a_certificate_and_a_key_both_serve() {
    let context = context();
    for cipher in [
        "ECDHE-ECDSA-AES128-GCM-SHA256",
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        "ECDHE-ECDSA-CHACHA20-POLY1305",
        "ECDHE-ECDSA-AES128-CCM",
        "ECDHE-ECDSA-AES256-CCM",
        "ECDHE-ECDSA-AES128-CCM8",
        "ECDHE-ECDSA-AES256-CCM8",
        "ECDHE-PSK-CHACHA20-POLY1305",
        "PSK-CHACHA20-POLY1305",
        "PSK-AES128-GCM-SHA256",
        "PSK-AES256-GCM-SHA384",
        "PSK-AES128-CCM",
        "PSK-AES256-CCM",
        "PSK-AES128-CCM8",
        "PSK-AES256-CCM8",
    ] {
        let (mut device, mut session) = established(&context, Device::with(cipher));
        assert_alive(&mut device, &mut session);
        assert_eq!(session.cipher(), Some(cipher));
        let identity = session.peer().unwrap().psk_identity.clone();
        let expected = cipher.contains("PSK").then_some(IDENTITY.as_bytes());
        assert_eq!(identity.as_deref(), expected, "{cipher}");
    }
}

#[test]
fn a_record_is_a_message() {
    let (mut device, mut session) = established(&context(), Device::new());
    // Two records in one datagram, and one more datagram before anything is read.
    let mut packed = device.message(b"one").to_vec();
    packed.extend(device.message(b"two"));
    session.receive(&packed);
    session.receive(&device.message(b"three"));
    for expected in [&b"one"[..], b"two", b"three"] {
        assert_eq!(read(&mut session).unwrap(), expected);
    }
    assert_eq!(read(&mut session), None);

    for size in [1, 1200, 4096, MAX_MESSAGE] {
        let message = vec![7; size];
        session.receive(&device.message(&message));
        assert_eq!(read(&mut session).unwrap(), message);
        session.write(&message).unwrap();
        device.receive(&session.next_datagram().unwrap());
        assert_eq!(device.read().unwrap(), message);
        assert_eq!(session.next_datagram(), None);
    }
    let limit = MAX_MESSAGE;
    let too_large = session.write(&vec![7; MAX_MESSAGE + 1]);
    assert_eq!(too_large, Err(WriteError::TooLarge { limit }));
    assert_alive(&mut device, &mut session);
}

#[test]
fn a_message_is_cut_off_by_a_small_buffer_and_does_not_go_on_in_the_next() {
    let (mut device, mut session) = established(&context(), Device::new());
    session.receive(&device.message(b"a long message"));
    session.receive(&device.message(b"next"));
    let mut small = [0; 6];
    assert_eq!(session.read(&mut small), Read::Data(6));
    assert_eq!(&small, b"a long");
    assert_eq!(session.read(&mut small), Read::Data(4));
    assert_eq!(session.read(&mut small), Read::Pending);
}

#[test]
fn a_message_may_be_empty() {
    for cipher in ["ECDHE-ECDSA-AES128-GCM-SHA256", "PSK-AES128-CCM8"] {
        let (mut device, mut session) = established(&context(), Device::with(cipher));
        // OpenSSL does neither send nor read an empty record: ours has to do.
        session.write(b"").unwrap();
        let empty = session.next_datagram().unwrap();
        assert!(empty.len() < 40);
        device.receive(&empty);
        device.read().unwrap_err();
        assert_alive(&mut device, &mut session);
    }
}

#[test]
fn a_smaller_bound_of_messages_holds() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        max_message: 1000,
        ..options(dir.path())
    };
    let (_, mut session) = established(&Context::new(&options).unwrap(), Device::new());
    session.write(&[0; 1000]).unwrap();
    let refused = session.write(&[0; 1001]);
    assert_eq!(refused, Err(WriteError::TooLarge { limit: 1000 }));
}

#[test]
fn what_is_not_sent_is_bounded() {
    let (_, mut session) = established(&context(), Device::new());
    while session.next_datagram().is_some() {}
    let sent = (0..1000)
        .take_while(|_| session.write(b"x").is_ok())
        .count();
    assert_eq!(sent, super::super::wire::MAX_OUTGOING);
    assert_eq!(session.write(b"x"), Err(WriteError::Full));
    session.next_datagram().unwrap();
    session.write(b"x").unwrap();
}

#[test]
fn nothing_is_written_before_the_handshake_is_done() {
    let now = Instant::now();
    let mut gate = Gate::new(context(), now).unwrap();
    let hello = Device::new().hello(&mut gate, now, address(1));
    let Offer::Accepted(mut session) = gate.offer(now, address(1), &hello) else {
        panic!("not accepted");
    };
    assert_eq!(session.write(b"x"), Err(WriteError::NotEstablished));
    assert_eq!(session.read(&mut [0; 9]), Read::Pending);
    assert_eq!(session.peer(), None);
}

#[test]
fn either_side_closes() {
    let context = context();
    let (mut device, mut session) = established(&context, Device::new());
    session.close();
    device.receive(&session.next_datagram().unwrap());
    let error = device.stream.ssl_read(&mut [0; 9]).unwrap_err();
    assert_eq!(error.code(), ErrorCode::ZERO_RETURN);
    assert_eq!(session.write(b"x"), Err(WriteError::Closed));
    assert_eq!(session.read(&mut [0; 9]), Read::Closed);

    let (mut device, mut session) = established(&context, Device::new());
    session.receive(&device.message(b"last words"));
    device.stream.shutdown().unwrap();
    session.receive(&device.next_datagram().unwrap());
    assert_eq!(read(&mut session).unwrap(), b"last words");
    assert_eq!(session.read(&mut [0; 9]), Read::Closed);
    assert_eq!(session.failure(), None);
    assert!(session.is_closed() && !session.is_established());
    session.close();
    device.receive(&session.next_datagram().unwrap());
    let error = device.stream.ssl_read(&mut [0; 9]).unwrap_err();
    assert_eq!(error.code(), ErrorCode::ZERO_RETURN);
}

#[test]
fn a_device_that_starts_again_is_known_by_its_hello() {
    let context = context();
    let now = Instant::now();
    let (mut device, mut session) = established(&context, Device::new());
    let mut gate = Gate::new(context, now).unwrap();
    let mut restarted = Device::new();
    let hello = restarted.hello(&mut gate, now, address(1));
    assert!(session.is_restart(&hello));
    assert!(!session.is_restart(&device.message(b"data")));
    assert!(!session.is_restart(b"garbage"));
    session.receive(&hello);
    assert_alive(&mut device, &mut session);
    let Offer::Accepted(next) = gate.offer(now, address(1), &hello) else {
        panic!("not accepted");
    };
    assert!(!next.is_restart(&hello), "sent again");
}

#[test]
fn nothing_is_lost_when_one_message_is_read_for_one_that_comes() {
    let (mut device, mut session) = established(&context(), Device::new());
    let mut buffer = vec![0; MAX_MESSAGE];
    session.receive(&device.message(&[7; 1000]));
    for _ in 0..200 {
        session.receive(&device.message(&[7; 1000]));
        assert_eq!(session.read(&mut buffer), Read::Data(1000));
    }
}
