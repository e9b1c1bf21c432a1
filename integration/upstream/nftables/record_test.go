//go:build upstream

// Our part of upstream's package: it writes down whose packets upstream's tests follow, and where
// they expect them to come out.
package nftables

import (
	"path/filepath"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"portcullis.dev/integration/upstream/record"
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
	scenario := scenario{
		Test:           record.Test(t),
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
	record.Write(t, scenario)
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
