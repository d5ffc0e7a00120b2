/* A DTLS client of Mbed TLS 2.28 or 3: each line of its input is a message, each message
   that comes is written out.

     mbedtls_client PORT psk IDENTITY HEXKEY
     mbedtls_client PORT cert CAFILE CERTFILE KEYFILE */

#include <mbedtls/ctr_drbg.h>
#include <mbedtls/entropy.h>
#include <mbedtls/net_sockets.h>
#include <mbedtls/ssl.h>
#include <mbedtls/timing.h>
#include <mbedtls/version.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(const char *what, int result) {
    if (result != 0) {
        fprintf(stderr, "%s: -0x%x\n", what, (unsigned)-result);
        exit(1);
    }
}

int main(int argc, char **argv) {
    mbedtls_net_context net;
    mbedtls_entropy_context entropy;
    mbedtls_ctr_drbg_context drbg;
    mbedtls_ssl_config config;
    mbedtls_ssl_context ssl;
    mbedtls_timing_delay_context timer;
    mbedtls_x509_crt authority, certificate;
    mbedtls_pk_context key;
    unsigned char psk[64];
    size_t psk_length = 0;
    static const int psk_suites[] = {MBEDTLS_TLS_PSK_WITH_AES_128_CCM_8, 0};

    if (argc < 5) return 2;
    mbedtls_net_init(&net);
    mbedtls_entropy_init(&entropy);
    mbedtls_ctr_drbg_init(&drbg);
    mbedtls_ssl_config_init(&config);
    mbedtls_ssl_init(&ssl);
    mbedtls_x509_crt_init(&authority);
    mbedtls_x509_crt_init(&certificate);
    mbedtls_pk_init(&key);
    check("seed", mbedtls_ctr_drbg_seed(&drbg, mbedtls_entropy_func, &entropy, NULL, 0));
    check("config", mbedtls_ssl_config_defaults(&config, MBEDTLS_SSL_IS_CLIENT,
                                                MBEDTLS_SSL_TRANSPORT_DATAGRAM,
                                                MBEDTLS_SSL_PRESET_DEFAULT));
    mbedtls_ssl_conf_rng(&config, mbedtls_ctr_drbg_random, &drbg);
    if (strcmp(argv[2], "psk") == 0) {
        for (const char *at = argv[4]; at[0] && at[1]; at += 2)
            sscanf(at, "%2hhx", &psk[psk_length++]);
        check("psk", mbedtls_ssl_conf_psk(&config, psk, psk_length,
                                          (const unsigned char *)argv[3], strlen(argv[3])));
        mbedtls_ssl_conf_ciphersuites(&config, psk_suites);
    } else if (argc == 6) {
        check("authority", mbedtls_x509_crt_parse_file(&authority, argv[3]));
        check("certificate", mbedtls_x509_crt_parse_file(&certificate, argv[4]));
#if MBEDTLS_VERSION_MAJOR >= 3
        check("key", mbedtls_pk_parse_keyfile(&key, argv[5], NULL, mbedtls_ctr_drbg_random, &drbg));
#else
        check("key", mbedtls_pk_parse_keyfile(&key, argv[5], NULL));
#endif
        mbedtls_ssl_conf_ca_chain(&config, &authority, NULL);
        check("own", mbedtls_ssl_conf_own_cert(&config, &certificate, &key));
    }
    check("setup", mbedtls_ssl_setup(&ssl, &config));
    check("host", mbedtls_ssl_set_hostname(&ssl, "server"));
    check("connect", mbedtls_net_connect(&net, "127.0.0.1", argv[1], MBEDTLS_NET_PROTO_UDP));
    mbedtls_ssl_set_timer_cb(&ssl, &timer, mbedtls_timing_set_delay, mbedtls_timing_get_delay);
    mbedtls_ssl_set_bio(&ssl, &net, mbedtls_net_send, mbedtls_net_recv, mbedtls_net_recv_timeout);
    mbedtls_ssl_conf_read_timeout(&config, 20000);
    check("handshake", mbedtls_ssl_handshake(&ssl));

    char line[1000];
    while (fgets(line, sizeof line, stdin)) {
        unsigned char answer[1000];
        if (mbedtls_ssl_write(&ssl, (unsigned char *)line, strlen(line)) < 0) return 1;
        int count = mbedtls_ssl_read(&ssl, answer, sizeof answer);
        if (count < 0) check("read", count);
        fwrite(answer, 1, (size_t)count, stdout);
        fflush(stdout);
    }
    mbedtls_ssl_close_notify(&ssl);
    return 0;
}
