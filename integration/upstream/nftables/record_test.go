//go:build upstream

// Our part of upstream's package: it writes down whose packets upstream's tests follow, and where
// they expect them to come out.
package nftables

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"sigs.k8s.io/knftables"
)

// A scenario is a proxy in some state, and packets.
type scenario struct {
	Test           string                     `json:"test"`
	Line           string                     `json:"line"`
	Proxy          proxySettings              `json:"proxy"`
	Services       []*v1.Service              `json:"services"`
	EndpointSlices []*discovery.EndpointSlice `json:"endpointSlices"`
	Flows          []flow                     `json:"flows"`
}

type proxySettings struct {
	NodeName string      `json:"nodeName"`
	Family   v1.IPFamily `json:"ipFamily"`
	NodeIP   string      `json:"nodeIP"`
	// All addresses of the node, of both families.
	LocalAddresses []string `json:"localAddresses"`
	// Of the proxy's family.
	NodePortAddresses []string `json:"nodePortAddresses"`
	ServiceCIDRs      []string `json:"serviceCIDRs"`
	// Where pods of this node are; null where the proxy does not know.
	PodCIDR       *string `json:"podCIDR"`
	MasqueradeAll bool    `json:"masqueradeAll"`
}

type flow struct {
	Source      string      `json:"source"`
	Protocol    v1.Protocol `json:"protocol"`
	Destination string      `json:"destination"`
	Port        int         `json:"port"`
	// REJECT, DROP, or every endpoint that may be chosen; empty where the proxy leaves the packet
	// alone.
	Outcome    []string `json:"outcome"`
	Masquerade bool     `json:"masquerade"`
}

func recordFlows(
	t *testing.T, line string, nft *knftables.Fake, addresses []string, tests []packetFlowTest,
) {
	one := byRuleset[nft]
	if one == nil {
		return // a test of the tracer itself, on a ruleset that no proxy wrote
	}
	test, _, _ := strings.Cut(t.Name(), "/")
	scenario := scenario{
		Test:           test,
		Line:           place(line),
		Proxy:          settings(t, one.proxier, addresses),
		Services:       sorted(one.services),
		EndpointSlices: sorted(one.slices),
	}
	for _, test := range tests {
		protocol := test.protocol
		if protocol == "" {
			protocol = v1.ProtocolTCP
		}
		outcome := []string{}
		if test.output != "" {
			outcome = strings.Split(test.output, ", ")
		}
		scenario.Flows = append(scenario.Flows, flow{
			test.sourceIP, protocol, test.destIP, test.destPort, outcome, test.masq,
		})
	}
	write(t, scenario)
}

// place turns " (from DIRECTORY/FILE:LINE)" into "FILE:LINE".
func place(line string) string {
	_, path, _ := strings.Cut(strings.TrimSuffix(line, ")"), "(from ")
	return filepath.Base(path)
}

func settings(t *testing.T, proxier *Proxier, addresses []string) proxySettings {
	settings := proxySettings{
		NodeName:          proxier.nodeName,
		Family:            proxier.ipFamily,
		NodeIP:            proxier.nodeIP.String(),
		LocalAddresses:    addresses,
		NodePortAddresses: strings.Fields(strings.Trim(proxier.nodePortAddresses.String(), "[]")),
		ServiceCIDRs:      strings.Split(proxier.serviceCIDRs, ","),
		MasqueradeAll:     proxier.masqueradeAll,
	}
	if proxier.localDetector.IsImplemented() {
		rule := proxier.localDetector.IfLocalNFT()
		if len(rule) != 3 || rule[1] != "saddr" {
			t.Fatalf("the facts have no place for %v", rule)
		}
		settings.PodCIDR = &rule[2]
	}
	return settings
}

func write(t *testing.T, one any) {
	line, err := json.Marshal(one)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(
		os.Getenv("UPSTREAM_RECORD"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := fmt.Fprintf(file, "%s\n", line); err != nil {
		t.Fatal(err)
	}
}
